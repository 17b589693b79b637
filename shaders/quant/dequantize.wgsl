// values = scale * code: a block-quantised matrix, or chosen rows of it, in f32.
//
// codes and scales as in lib/blocks.wgsl, values f32 [rows, K]. `gather`: row i is row ids[i] of the matrix;
// an id outside 0 .. limit - 1 gives zeros. The product of a code and a scale is exact. One invocation makes
// the 32 values of one block.

import package::lib::index::workgroup_index;
import package::lib::blocks::{raw, half_at, STEP, OFFSET, WORDS};

struct Params { rows: u32, blocks: u32, limit: u32 }  // blocks per row; rows of the matrix

@group(0) @binding(0) var<storage, read> codes: array<u32>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read_write> values: array<vec4f>;
@group(0) @binding(3) var<storage, read> ids: array<i32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;

@compute @workgroup_size(WG)
fn dequantize(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / params.blocks;
  if (row >= params.rows) { return; }
  @if(gather) let from_row = u32(ids[row]);   // a negative id becomes a large one
  @else let from_row = row;
  let inside = from_row < params.limit;
  let at = min(from_row, params.limit - 1u) * params.blocks + i % params.blocks;
  var scale = half_at(scales[at / 2u], at);
  if (!inside) { scale = 0.0; }
  for (var j = 0u; j < WORDS; j++) {
    let word = codes[at * WORDS + j];
    @if(q4) {
      values[i * 8u + 2u * j] = (raw(word) * STEP - OFFSET) * scale;
      values[i * 8u + 2u * j + 1u] = (raw(word >> 4u) * STEP - OFFSET) * scale;
    }
    @else values[i * 8u + j] = (raw(word) * STEP - OFFSET) * scale;
  }
}
