// Keeps a router's logits small: factor * sum_t z_t^2, z_t = log sum_e exp(logits_te).
//
//   logits, dlogits [T, E]; z [T]; loss []
//
// terms:    z_t; one invocation takes one token
// total:    loss; one workgroup
// gradient: dlogit_te = dloss * factor * 2 z_t exp(logits_te - z_t); one invocation takes one entry
// Source: ST-MoE (arXiv 2202.08906) equation 5.
import package::lib::index::workgroup_index;
import package::lib::reduce::workgroup_sum;

override WG: u32 = 64;

struct Params {
  tokens: u32,
  experts: u32,
  factor: f32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read_write> z: array<f32>;
@group(0) @binding(2) var<storage, read_write> loss: array<f32>;
@group(0) @binding(3) var<storage, read> dloss: array<f32>;
@group(0) @binding(4) var<storage, read_write> dlogits: array<f32>;
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
  var top = logits[row];
  for (var e = 1u; e < params.experts; e++) {
    top = max(top, logits[row + e]);
  }
  var sum = 0.0;
  for (var e = 0u; e < params.experts; e++) {
    sum += exp(logits[row + e] - top);
  }
  z[token] = top + log(sum);
}

@compute @workgroup_size(WG)
fn total(@builtin(local_invocation_index) lane: u32) {
  var sum = 0.0;
  for (var token = lane; token < params.tokens; token += WG) {
    sum += z[token] * z[token];
  }
  let all = workgroup_sum(sum, lane);
  if (lane == 0u) {
    loss[0] = params.factor * all;
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
  let zt = z[i / params.experts];
  // z is at least the largest logit, but for its rounding.
  dlogits[i] = dloss[0] * params.factor * 2.0 * zt * exp(min(logits[i] - zt, 0.0));
}
