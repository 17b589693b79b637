// y[t] = W[ids[t] - begin]: rows of a table, of which W holds those from `begin` on; in f32.
//
// ids [T], W [V, D], y [T, D]; an id outside begin .. begin + V - 1 gives a row of zeros. One invocation
// copies one vector (`vec4`: four columns) of one row.

import package::lib::index::workgroup_index;

@if(vec4) alias V = vec4f;
@else alias V = f32;

struct Params { tokens: u32, vocab: u32, cols: u32, begin: u32 }  // cols in vectors

@group(0) @binding(0) var<storage, read> ids: array<i32>;
@group(0) @binding(1) var<storage, read> weight: array<V>;
@group(0) @binding(2) var<storage, read_write> y: array<V>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn embedding(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let token = i / params.cols;
  if (token >= params.tokens) { return; }
  let id = u32(ids[token]) - params.begin;    // what is below becomes a large one
  var value = V();
  if (id < params.vocab) { value = weight[id * params.cols + i % params.cols]; }
  y[i] = value;
}
