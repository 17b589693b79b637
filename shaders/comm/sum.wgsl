// y[r, c] = x0[r, first + c] + x1[r, first + c] + ..., in this order: the same columns of up to six matrices.
//
// With the condition `more`, y + x0 + ...: what came before is already in y. Widths and offsets count V:
// vec4 where all of them are multiples of 4 (condition `vec4`). Sums of f32, or of u32 with `integers`.
// Of six bindings the first `inputs` are read. One invocation makes every `parts`-th element of a row.
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
@group(0) @binding(6) var<storage, read_write> y: array<V>;

struct Params {
  rows: u32,
  width: u32,
  cols: u32,
  first: u32,
  parts: u32,
  inputs: u32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@compute @workgroup_size(WG)
fn sum(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / params.parts;
  if (row >= params.rows) { return; }
  let inputs = params.inputs;
  for (var c = i % params.parts; c < params.width; c += params.parts) {
    let at = row * params.cols + params.first + c;
    let place = row * params.width + c;
    var total = x0[at];
    @if(more) total = y[place] + total;
    if (inputs > 1u) { total += x1[at]; }
    if (inputs > 2u) { total += x2[at]; }
    if (inputs > 3u) { total += x3[at]; }
    if (inputs > 4u) { total += x4[at]; }
    if (inputs > 5u) { total += x5[at]; }
    y[place] = total;
  }
}
