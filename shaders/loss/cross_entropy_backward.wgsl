// dlogits[t, v] = dloss / scored rows * (exp(logit[t, v] - lse[t]) - [v = label[t]]), zero for rows that are
// not scored.
//
// logits and dlogits [T, stride] hold the columns chunk .. chunk + width of the whole vocabulary; columns
// width .. stride - 1 are padding and become zero, so that a product over them adds nothing. One invocation
// computes four neighbouring columns of one row. lse is at least every logit, so exp is taken of values <= 0,
// up to rounding.

import package::lib::index::workgroup_index;

struct Params { rows: u32, stride: u32, width: u32, chunk: u32, vocab: u32 }  // stride a multiple of 4

@group(0) @binding(0) var<storage, read> logits: array<vec4f>;
@group(0) @binding(1) var<storage, read> labels: array<i32>;
@group(0) @binding(2) var<storage, read> lse: array<f32>;
@group(0) @binding(3) var<storage, read> scale: array<f32>;
@group(0) @binding(4) var<storage, read> dloss: array<f32>;
@group(0) @binding(5) var<storage, read_write> dlogits: array<vec4f>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn cross_entropy_backward(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / (params.stride / 4u);
  if (row >= params.rows) { return; }
  let label = u32(labels[row]);               // a negative label becomes a large one
  var d = vec4f();
  if (label < params.vocab) {
    let column = i % (params.stride / 4u) * 4u + vec4u(0u, 1u, 2u, 3u);
    let p = exp(logits[i] - lse[row]);
    let hit = select(vec4f(), vec4f(1.0), column + params.chunk == vec4u(label));
    d = select(vec4f(), (p - hit) * (scale[0] * dloss[0]), column < vec4u(params.width));
  }
  dlogits[i] = d;
}
