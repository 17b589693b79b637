// y_j[r, c] = x0[r, first + j * step + c] + x1[r, first + j * step + c] + ..., in this order: columns of up
// to four matrices, for up to four ranks.
//
// With the condition `more`, y_j + x0 + ...: what came before is already in y_j. Widths and offsets count V:
// vec4 where all of them are multiples of 4 (condition `vec4`). Sums of f32, or of u32 with `integers`;
// with `largest` the largest instead of the sum. Of the bindings the first `inputs` and `outputs` are used.
// One invocation makes every `parts`-th element of a row; a sum that all ranks get alike (step 0) is made
// once.
import package::lib::index::workgroup_index;

@if(vec4 && integers) alias V = vec4u;
@if(vec4 && !integers) alias V = vec4f;
@if(!vec4 && integers) alias V = u32;
@if(!vec4 && !integers) alias V = f32;

@group(0) @binding(0) var<storage, read> x0: array<V>;
@group(0) @binding(1) var<storage, read> x1: array<V>;
@group(0) @binding(2) var<storage, read> x2: array<V>;
@group(0) @binding(3) var<storage, read> x3: array<V>;
@group(0) @binding(4) var<storage, read_write> y0: array<V>;
@group(0) @binding(5) var<storage, read_write> y1: array<V>;
@group(0) @binding(6) var<storage, read_write> y2: array<V>;
@group(0) @binding(7) var<storage, read_write> y3: array<V>;

struct Params {
  rows: u32,
  width: u32,
  cols: u32,
  first: u32,
  step: u32,
  parts: u32,
  inputs: u32,
  outputs: u32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

fn joined(a: V, b: V) -> V {
  @if(largest) return max(a, b);
  @else return a + b;
}

fn sum_at(at: u32, before: V) -> V {
  var total = x0[at];
  @if(more) total = joined(before, total);
  if (params.inputs > 1u) { total = joined(total, x1[at]); }
  if (params.inputs > 2u) { total = joined(total, x2[at]); }
  if (params.inputs > 3u) { total = joined(total, x3[at]); }
  return total;
}

@compute @workgroup_size(WG)
fn sum(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / params.parts;
  if (row >= params.rows) { return; }
  for (var c = i % params.parts; c < params.width; c += params.parts) {
    let at = row * params.cols + params.first + c;
    let place = row * params.width + c;
    var total = V();
    for (var j = 0u; j < params.outputs; j++) {
      if (j == 0u || params.step > 0u) {
        var before = V();
        @if(more) before = before_of(j, place);
        total = sum_at(at + j * params.step, before);
      }
      if (j == 0u) { y0[place] = total; }
      else if (j == 1u) { y1[place] = total; }
      else if (j == 2u) { y2[place] = total; }
      else { y3[place] = total; }
    }
  }
}

@if(more) fn before_of(j: u32, place: u32) -> V {
  if (j == 0u) { return y0[place]; }
  if (j == 1u) { return y1[place]; }
  if (j == 2u) { return y2[place]; }
  return y3[place];
}
