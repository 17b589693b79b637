// Load balance loss of a router: the mean over sequences of coeff * E * sum_e f_e sum_t p_te / tokens, where
// p_te = s_te / (sum_f s_tf + 1e-20) and f_e is the share of the choices that fell on expert e.
//
//   logits, dlogits [S * L, E]; counts u32 [S, E] of choices, constants for the gradient; value, weight,
//   inverse [S * L]; loss []
//
// The counts may be of more tokens than the logits: of other ranks, or of several micro-batches.
//
// terms:    weight_t = factor / sum_e n_e, inverse_t = 1 / (sum_f s_tf + 1e-20) and value_t = weight_t *
//           sum_e n_e p_te; one invocation takes one token
// total:    loss = sum_t value_t; one workgroup
// gradient: dlogit_te = dloss * (weight_t * n_e - value_t) * inverse_t * ds/dlogit; one invocation takes one
//           entry
// Source: DeepSeek-V3 (arXiv 2412.19437) equations 17 to 20; Switch Transformers (arXiv 2101.03961) section
// 2.2.
import package::lib::index::workgroup_index;
import package::lib::reduce::workgroup_sum;
import package::lib::router_score::router_score;
import package::lib::router_score::router_score_slope;

override WG: u32 = 64;
override SCORE: u32 = 0;

struct Params {
  tokens: u32,
  seqlen: u32,
  experts: u32,
  factor: f32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> counts: array<u32>;
@group(0) @binding(2) var<storage, read_write> value: array<f32>;
@group(0) @binding(3) var<storage, read_write> weight: array<f32>;
@group(0) @binding(4) var<storage, read_write> inverse: array<f32>;
@group(0) @binding(5) var<storage, read_write> loss: array<f32>;
@group(0) @binding(6) var<storage, read> dloss: array<f32>;
@group(0) @binding(7) var<storage, read_write> dlogits: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

// Only softmax needs it: the score of the largest logit is 1, so that no exp overflows.
fn largest(row: u32) -> f32 {
  var top = logits[row];
  if (SCORE == 1u) {
    for (var e = 1u; e < params.experts; e++) {
      top = max(top, logits[row + e]);
    }
  }
  return top;
}

@compute @workgroup_size(WG)
fn terms(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let token = workgroup_index(wid, nwg) * WG + lane;
  if (token >= params.tokens) {
    return;
  }
  let row = token * params.experts;
  let count_row = token / params.seqlen * params.experts;
  let top = largest(row);
  var sum = 1e-20;
  var weighted = 0.0;
  var choices = 0u;
  for (var e = 0u; e < params.experts; e++) {
    let s = router_score(SCORE, logits[row + e], top);
    let n = counts[count_row + e];
    sum += s;
    weighted += f32(n) * s;
    choices += n;
  }
  let w = params.factor / f32(max(choices, 1u));
  value[token] = w * weighted / sum;
  weight[token] = w;
  inverse[token] = 1.0 / sum;
}

@compute @workgroup_size(WG)
fn total(@builtin(local_invocation_index) lane: u32) {
  var sum = 0.0;
  for (var token = lane; token < params.tokens; token += WG) {
    sum += value[token];
  }
  let all = workgroup_sum(sum, lane);
  if (lane == 0u) {
    loss[0] = all;
  }
}

@compute @workgroup_size(WG)
fn gradient(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (i >= params.tokens * params.experts) {
    return;
  }
  let token = i / params.experts;
  let count = counts[token / params.seqlen * params.experts + i % params.experts];
  let x = logits[i];
  let s = router_score(SCORE, x, largest(token * params.experts));
  let ds = dloss[0] * (weight[token] * f32(count) - value[token]) * inverse[token];
  dlogits[i] = ds * router_score_slope(SCORE, x, s);
}
