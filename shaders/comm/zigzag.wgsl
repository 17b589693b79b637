// Stretches of positions in another order. A row [n, width] has n = 2 ranks stretches; rank r holds those
// with the numbers r and n - 1 - r, so that the ranks' stretches side by side are, at place p,
//
//   z(p) = p / 2 where p is even, n - 1 - (p - 1) / 2 where it is odd
//
//   to_sequence: dst[row, z(p)] = src[row, p]; to_ranks: dst[row, p] = src[row, z(p)]
//
// Widths count elements of V: vec4 where they are multiples of 4 (condition `vec4`). Works on any 32-bit
// elements. One invocation takes every `parts`-th element of a stretch.
import package::lib::index::workgroup_index;

@if(vec4) alias V = vec4u;
@else alias V = u32;

@group(0) @binding(0) var<storage, read> src: array<V>;
@group(0) @binding(1) var<storage, read_write> dst: array<V>;

struct Params {
  total: u32, // stretches of all rows
  n: u32,
  width: u32,
  parts: u32,
  to_sequence: u32, // 1 or 0
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn zigzag(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let place = i / params.parts;
  if (place >= params.total) { return; }
  let p = place % params.n;
  let z = place - p + select(p / 2u, params.n - 1u - p / 2u, p % 2u == 1u);
  let source = select(z, place, params.to_sequence == 1u) * params.width;
  let goal = select(place, z, params.to_sequence == 1u) * params.width;
  for (var c = i % params.parts; c < params.width; c += params.parts) {
    dst[goal + c] = src[source + c];
  }
}
