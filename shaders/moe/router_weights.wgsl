// Weights of experts that are chosen already.
//
//   logits [T, E], topk_idx u32 [T, K] -> topk_weight [T, K]. One invocation takes one token.
import package::lib::index::workgroup_index;
import package::lib::router_score::router_score;
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
@group(0) @binding(2) var<storage, read_write> topk_weight: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn router_weights(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let token = workgroup_index(wid, nwg) * WG + lane;
  if (token >= params.tokens) {
    return;
  }
  let row = token * params.experts;
  let out = token * params.topk;
  let top = top_logit(row, out);
  let factor = params.scaling / score_divisor(row, out, top);
  for (var k = 0u; k < params.topk; k++) {
    topk_weight[out + k] = router_score(SCORE, logits[row + chosen_expert(out + k)], top) * factor;
  }
}
