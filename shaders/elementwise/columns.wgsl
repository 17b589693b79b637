// Copies a block of columns: dst[r, dst_first + c] = src[r, src_first + c] for r < rows, c < width; with the
// condition `add` it adds f32 to what is there.
//
// Widths and offsets count elements of V: vec4 where all of them are multiples of 4 (condition `vec4`).
// Copies work on any 32-bit elements, since no arithmetic is done. One invocation takes every `parts`-th
// element of a row.
import package::lib::index::workgroup_index;

@if(vec4 && add) alias V = vec4f;
@if(vec4 && !add) alias V = vec4u;
@if(!vec4 && add) alias V = f32;
@if(!vec4 && !add) alias V = u32;

@group(0) @binding(0) var<storage, read> src: array<V>;
@group(0) @binding(1) var<storage, read_write> dst: array<V>;

struct Params {
  rows: u32,
  width: u32,
  src_cols: u32,
  src_first: u32,
  dst_cols: u32,
  dst_first: u32,
  parts: u32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn columns(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / params.parts;
  if (row >= params.rows) { return; }
  let source = row * params.src_cols + params.src_first;
  let place = row * params.dst_cols + params.dst_first;
  for (var c = i % params.parts; c < params.width; c += params.parts) {
    @if(add) dst[place + c] += src[source + c];
    @else dst[place + c] = src[source + c];
  }
}
