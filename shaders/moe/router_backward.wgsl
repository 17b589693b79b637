// Gradient of the router's weights with respect to the logits; the choice itself and the bias have none.
//
//   s / sum of the chosen: ds_e = scaling * (g_e - sum_f g_f s_f / S) / S, S = sum of the chosen s + 1e-20
//   s as it is:            ds_e = scaling * g_e
//   dlogit = ds * ds/dlogit, zero for experts that were not chosen (dlogits comes cleared)
//   softmax over all:      dlogit_e = scaling * p_e * (g_e - sum_f g_f p_f) with g = 0 where not chosen
//
//   logits, dlogits [T, E]; topk_idx, dweight [T, K]. One invocation takes one token.
import package::lib::index::workgroup_index;
import package::lib::router_score::router_score;
import package::lib::router_score::router_score_slope;
import package::lib::router_weights::{chosen_expert, score_divisor, top_logit};

override WG: u32 = 64;
override SCORE: u32 = 0;

struct Params {
  tokens: u32,
  experts: u32,
  topk: u32,
  normalise: u32,
  scaling: f32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> topk_idx: array<u32>;
@group(0) @binding(2) var<storage, read> dweight: array<f32>;
@group(0) @binding(3) var<storage, read_write> dlogits: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn router_backward(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let token = workgroup_index(wid, nwg) * WG + lane;
  if (token >= params.tokens) {
    return;
  }
  let row = token * params.experts;
  let first = token * params.topk;
  let top = top_logit(row, first);
  let divisor = score_divisor(row, first, top);
  var mean = 0.0;
  if (params.normalise != 0u || SCORE == 1u) {
    for (var k = 0u; k < params.topk; k++) {
      mean += dweight[first + k] * router_score(SCORE, logits[row + chosen_expert(first + k)], top);
    }
    mean /= divisor;
  }
  if (params.normalise == 0u && SCORE == 1u) {
    for (var e = 0u; e < params.experts; e++) {
      dlogits[row + e] = -params.scaling * mean / divisor * router_score(SCORE, logits[row + e], top);
    }
  }
  for (var k = 0u; k < params.topk; k++) {
    let at = row + chosen_expert(first + k);
    let x = logits[at];
    let s = router_score(SCORE, x, top);
    dlogits[at] =
      params.scaling * (dweight[first + k] - mean) / divisor * router_score_slope(SCORE, x, s);
  }
}
