// How far each expert's logits stand above what its tokens would need to be chosen:
//   estimate_e = the n-th largest over the tokens of logits_te - alpha_t,
//   alpha_t    = the smallest of the token's K + 1 largest logits + bias
//
//   logits [T, E], bias [E], topk_idx u32 [T, K + 1] -> alpha [T], estimate [E]
//
// thresholds: alpha; one invocation takes one token
// quantile:   estimate; one workgroup takes one expert and finds its key bit by bit, by counting
import package::lib::index::workgroup_index;
import package::lib::order::order_key;
import package::lib::order::order_value;
import package::lib::reduce::workgroup_sum;

override WG: u32 = 64;

struct Params {
  tokens: u32,
  experts: u32,
  candidates: u32, // K + 1
  rank: u32, // n
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> bias: array<f32>;
@group(0) @binding(2) var<storage, read> topk_idx: array<u32>;
@group(0) @binding(3) var<storage, read_write> alpha: array<f32>;
@group(0) @binding(4) var<storage, read_write> estimate: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn thresholds(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let token = workgroup_index(wid, nwg) * WG + lane;
  if (token >= params.tokens) {
    return;
  }
  var least = 3.4e38;
  for (var k = token * params.candidates; k < (token + 1u) * params.candidates; k++) {
    let e = topk_idx[k];
    least = min(least, logits[token * params.experts + e] + bias[e]);
  }
  alpha[token] = least;
}

@compute @workgroup_size(WG)
fn quantile(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let e = workgroup_index(wid, nwg);
  if (e >= params.experts) {
    return;
  }
  var key = 0u;
  for (var bit = 0u; bit < 32u; bit++) {
    let trial = key | (0x80000000u >> bit);
    var above = 0.0; // whole numbers of tokens, exact up to 2^24 of them
    for (var t = lane; t < params.tokens; t += WG) {
      above += f32(order_key(logits[t * params.experts + e] - alpha[t]) >= trial);
    }
    if (workgroup_sum(above, lane) >= f32(params.rank)) {
      key = trial;
    }
  }
  if (lane == 0u) {
    estimate[e] = order_value(key);
  }
}
