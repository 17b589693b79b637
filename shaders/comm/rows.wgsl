// Rows of several ranks: y[r] = sum_j x[table[r, j]], in the order of j, where x are the matrices x0, x1, ...
// of `stride` rows each on top of each other. What the table says with NONE counts nothing.
//
//   table u32 [rows, per] -> y [rows, D], in elements of V: vec4 where D is a multiple of 4 (`vec4`)
//
// A launch reads up to six matrices, from number `first` on; with the condition `more` it adds to y.
// `integers`: whole numbers, which are not added but copied, per = 1; a row of nobody is all ones. One
// invocation makes every `parts`-th element of a row, four at a time.
import package::lib::index::workgroup_index;

@if(vec4 && integers) alias V = vec4u;
@if(vec4 && !integers) alias V = vec4f;
@if(!vec4 && integers) alias V = u32;
@if(!vec4 && !integers) alias V = f32;

@group(0) @binding(0) var<storage, read> x0: array<V>;
@group(0) @binding(1) var<storage, read> x1: array<V>;
@group(0) @binding(2) var<storage, read> x2: array<V>;
@group(0) @binding(3) var<storage, read> x3: array<V>;
@group(0) @binding(4) var<storage, read> x4: array<V>;
@group(0) @binding(5) var<storage, read> x5: array<V>;
@group(0) @binding(6) var<storage, read> table: array<u32>;
@group(0) @binding(7) var<storage, read_write> y: array<V>;

struct Params {
  rows: u32,
  cols: u32, // in V
  parts: u32,
  per: u32,
  stride: u32,
  first: u32,
  inputs: u32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;
const NONE: u32 = 0xffffffffu;

@if(integers) fn joined(sum: V, value: V) -> V { return value; }
@else fn joined(sum: V, value: V) -> V { return sum + value; }

fn element(input: u32, at: u32) -> V {
  if (input == 0u) { return x0[at]; }
  if (input == 1u) { return x1[at]; }
  if (input == 2u) { return x2[at]; }
  if (input == 3u) { return x3[at]; }
  if (input == 4u) { return x4[at]; }
  return x5[at];
}

@compute @workgroup_size(WG)
fn rows(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / params.parts;
  if (row >= params.rows) { return; }
  let step = params.parts;
  for (var c = i % step; c < params.cols; c += 4u * step) {
    // Columns past the end read the last one and are not written.
    let last = params.cols - 1u;
    let c1 = min(c + step, last);
    let c2 = min(c + 2u * step, last);
    let c3 = min(c + 3u * step, last);
    let at = row * params.cols;
    @if(integers) var s0 = V(NONE);
    @else var s0 = V();
    var s1 = s0;
    var s2 = s0;
    var s3 = s0;
    @if(more) s0 = y[at + c];
    @if(more) s1 = y[at + c1];
    @if(more) s2 = y[at + c2];
    @if(more) s3 = y[at + c3];
    for (var j = row * params.per; j < (row + 1u) * params.per; j++) {
      let entry = table[j];
      let input = entry / params.stride - params.first;
      if (entry == NONE || input >= params.inputs) { continue; }
      let from_row = entry % params.stride * params.cols;
      s0 = joined(s0, element(input, from_row + c));
      s1 = joined(s1, element(input, from_row + c1));
      s2 = joined(s2, element(input, from_row + c2));
      s3 = joined(s3, element(input, from_row + c3));
    }
    y[at + c] = s0;
    if (c + step < params.cols) { y[at + c + step] = s1; }
    if (c + 2u * step < params.cols) { y[at + c + 2u * step] = s2; }
    if (c + 3u * step < params.cols) { y[at + c + 3u * step] = s3; }
  }
}
