// dlogits[t, v] = dlse[t] exp(logit[t, v] - lse[t]) + dpicked[t] [v = label[t]] + dtotal[t]: the gradient of
// a row's log-sum-exp, of the logit that its label picks and of the sum of its logits.
//
// logits and dlogits [T, stride] hold the columns of labels chunk .. chunk + width; columns width ..
// stride - 1 are padding and become zero, so that a product over them adds nothing. One invocation computes
// four neighbouring columns of one row. lse is at least every logit, so exp is taken of values <= 0, up to
// rounding.

import package::lib::index::workgroup_index;

struct Params { rows: u32, stride: u32, width: u32, chunk: u32 }  // stride a multiple of 4

@group(0) @binding(0) var<storage, read> logits: array<vec4f>;
@group(0) @binding(1) var<storage, read> labels: array<i32>;
@group(0) @binding(2) var<storage, read> lse: array<f32>;
@group(0) @binding(3) var<storage, read> dlse: array<f32>;
@group(0) @binding(4) var<storage, read> dpicked: array<f32>;
@group(0) @binding(5) var<storage, read> dtotal: array<f32>;
@group(0) @binding(6) var<storage, read_write> dlogits: array<vec4f>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn log_sum_exp_backward(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / (params.stride / 4u);
  if (row >= params.rows) { return; }
  let column = i % (params.stride / 4u) * 4u + vec4u(0u, 1u, 2u, 3u);
  let hit = vec4f(column + params.chunk == vec4u(u32(labels[row])));
  let d = dlse[row] * exp(logits[i] - lse[row]) + dpicked[row] * hit + dtotal[row];
  dlogits[i] = select(vec4f(), d, column < vec4u(params.width));
}
