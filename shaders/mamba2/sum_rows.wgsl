// out[s,k] = the sum of x[r, offset + k] over the rows r of slice s: SLICE rows each, in their order.
//
// x [rows, stride], out [ceil(rows / SLICE), cols]. Launched again on its own output until one row is left,
// it sums any number of rows in a fixed order. One invocation sums one column of one slice.

import package::lib::index::workgroup_index;

struct Params {
  rows: u32,
  stride: u32,
  offset: u32,
  cols: u32,
  total: u32, // slices * cols
}

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
override SLICE: u32 = 64;

@compute @workgroup_size(WG)
fn sum_rows(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let first = id / params.cols * SLICE;
  let last = min(first + SLICE, params.rows);
  var sum = 0.0;
  for (var r = first; r < last; r++) {
    sum += x[r * params.stride + params.offset + id % params.cols];
  }
  out[id] = sum;
}
