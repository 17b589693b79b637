// out[r, first + k] (+)= sum over the pieces i of parts[at + i, r, k]: what ssd_walk_dx.wgsl and
// ssd_walk_dC.wgsl leave for each piece, in the order of the pieces.
//
// parts [pieces, rows, cols] from quad `at` on, out [rows, stride], all counted in quads; with `accumulate`
// the sum is added to out. One invocation sums one quad.

import package::lib::index::workgroup_index;

struct Params {
  pieces: u32,
  cols: u32,
  stride: u32,
  first: u32,
  at: u32,
  total: u32, // rows * cols
}

@group(0) @binding(0) var<storage, read> parts: array<vec4f>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4f>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;

@compute @workgroup_size(WG)
fn sum_pieces(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let to = id / params.cols * params.stride + params.first + id % params.cols;
  var sum = vec4f();
  @if(accumulate) sum = out[to];
  for (var i = 0u; i < params.pieces; i++) {
    sum += parts[params.at + i * params.total + id];
  }
  out[to] = sum;
}
