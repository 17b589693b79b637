// Sequence-wise load balance loss: the mean over sequences of coeff * E / (K * L^2) * sum_e n_e sum_t p_te,
// where p_te = s_te / sum_f s_tf, s = sigmoid(logits), and n_e counts the tokens of the sequence with e among
// their K best.
//
//   logits, dlogits [B, L, E]; counts u32 [B, E], constants for the gradient; value, inverse [B * L]; loss []
//
// terms:    value_t = sum_e c_e p_te with c_e = factor * n_e, and inverse_t = 1 / sum_f s_tf; one invocation
//           takes one token
// total:    loss = sum_t value_t / B; one workgroup
// gradient: dlogit_te = dloss / B * (c_e - value_t) * inverse_t * s * (1 - s); one invocation takes one entry
// Source: DeepSeek-V3 (arXiv 2412.19437) equations 17 to 20.
import package::lib::activations::sigmoid;
import package::lib::index::workgroup_index;
import package::lib::reduce::workgroup_sum;

override WG: u32 = 64;

struct Params {
  tokens: u32,
  seqlen: u32,
  experts: u32,
  factor: f32,
  inverse_batch: f32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> counts: array<u32>;
@group(0) @binding(2) var<storage, read_write> value: array<f32>;
@group(0) @binding(3) var<storage, read_write> inverse: array<f32>;
@group(0) @binding(4) var<storage, read_write> loss: array<f32>;
@group(0) @binding(5) var<storage, read> dloss: array<f32>;
@group(0) @binding(6) var<storage, read_write> dlogits: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

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
  var sum = 0.0;
  var weighted = 0.0;
  for (var e = 0u; e < params.experts; e++) {
    let s = sigmoid(logits[row + e]);
    sum += s;
    weighted += f32(counts[count_row + e]) * s;
  }
  value[token] = params.factor * weighted / sum;
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
    loss[0] = all * params.inverse_batch;
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
  let ds = dloss[0] * params.inverse_batch * (params.factor * f32(count) - value[token]) * inverse[token];
  dlogits[i] = ds * sigmoid(logits[i]) * sigmoid(-logits[i]);
}
