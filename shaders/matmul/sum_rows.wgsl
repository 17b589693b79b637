// out[p, j] (+)= sum over part p of x[i, j], in f32: bias gradients, and the parts of a long matmul sum.
//
// x [rows, cols], out [parts, cols]; part p is rows p * length .. (p + 1) * length. One invocation sums one
// vector (`vec4`: four columns) of one part, rows ascending; a long sum takes a second launch over the parts.
// One workgroup covers WG neighbouring columns.

import package::lib::index::workgroup_index;

@if(vec4) alias V = vec4f;
@else alias V = f32;

struct Params { rows: u32, cols: u32, parts: u32, length: u32 }  // cols in vectors

@group(0) @binding(0) var<storage, read> x: array<V>;
@group(0) @binding(1) var<storage, read_write> out: array<V>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;

@compute @workgroup_size(WG)
fn sum_rows(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let part = i / params.cols;
  let column = i % params.cols;
  if (part >= params.parts) { return; }
  let end = min(params.rows, (part + 1u) * params.length);
  var sum = V();
  for (var row = part * params.length; row < end; row++) {
    sum += x[row * params.cols + column];
  }
  @if(accumulate) sum += out[i];
  out[i] = sum;
}
