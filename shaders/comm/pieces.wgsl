// Pieces of up to four arrays put into up to four others. Of input i the piece for output j are `total` rows,
// `inner` of them to a block:
//
//   y_j[i * goal_step + goal(row) + c] = x_i[j * source_step + source(row) + c],  c < width
//   source(row) = source_first + row / inner * source_block + row % inner * source_row, and goal(row) alike
//
// i counts from first_input and j from first_output: a launch does a part of what larger groups exchange.
// With `paired` 1 only j = i. Everything counts elements of V: vec4 where all are multiples of 4 (condition
// `vec4`). Works on any 32-bit elements. Of the bindings the first `inputs` and `outputs` are used. One
// invocation takes every `parts`-th element of a row of one input.
import package::lib::index::workgroup_index;

@if(vec4) alias V = vec4u;
@else alias V = u32;

@group(0) @binding(0) var<storage, read> x0: array<V>;
@group(0) @binding(1) var<storage, read> x1: array<V>;
@group(0) @binding(2) var<storage, read> x2: array<V>;
@group(0) @binding(3) var<storage, read> x3: array<V>;
@group(0) @binding(4) var<storage, read_write> y0: array<V>;
@group(0) @binding(5) var<storage, read_write> y1: array<V>;
@group(0) @binding(6) var<storage, read_write> y2: array<V>;
@group(0) @binding(7) var<storage, read_write> y3: array<V>;

struct Params {
  inputs: u32,
  outputs: u32,
  first_input: u32,
  first_output: u32,
  paired: u32, // 1 or 0
  total: u32,
  inner: u32,
  width: u32,
  parts: u32,
  source_first: u32,
  source_step: u32,
  source_block: u32,
  source_row: u32,
  goal_first: u32,
  goal_step: u32,
  goal_block: u32,
  goal_row: u32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

fn taken(input: u32, at: u32) -> V {
  if (input == 0u) { return x0[at]; }
  if (input == 1u) { return x1[at]; }
  if (input == 2u) { return x2[at]; }
  return x3[at];
}

fn put(output: u32, at: u32, value: V) {
  if (output == 0u) { y0[at] = value; }
  else if (output == 1u) { y1[at] = value; }
  else if (output == 2u) { y2[at] = value; }
  else { y3[at] = value; }
}

@compute @workgroup_size(WG)
fn pieces(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let place = workgroup_index(wid, nwg) * WG + lane;
  let line = place / params.parts;
  let input = line / params.total;
  if (input >= params.inputs) { return; }
  let row = line % params.total;
  let block_number = row / params.inner;
  let inner_row = row % params.inner;
  let source = params.source_first + block_number * params.source_block + inner_row * params.source_row;
  let goal = params.goal_first + block_number * params.goal_block + inner_row * params.goal_row
    + (params.first_input + input) * params.goal_step;
  let begin = select(0u, input, params.paired == 1u);
  let end = select(params.outputs, input + 1u, params.paired == 1u);
  for (var c = place % params.parts; c < params.width; c += params.parts) {
    for (var output = begin; output < end; output++) {
      put(output, goal + c, taken(input, (params.first_output + output) * params.source_step + source + c));
    }
  }
}
