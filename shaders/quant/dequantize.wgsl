// values = code * scale (* outer scale, with `divides` / outer scale): a matrix of codes, or rows of it, in
// f32.
//
// codes and scales as in lib/blocks.wgsl, values f32 [rows, K]. `gather`: row i is row ids[i] of the matrix;
// an id outside 0 .. limit - 1 gives zeros. The product of a code and a scale is exact, that with the outer
// scale, or the quotient, rounds once. One invocation makes the values of one unit.

import package::lib::index::workgroup_index;
@if(divides) import package::lib::exact::exact_quotient;
import package::lib::blocks::{raw, small_values, scale_index, scale_value, STEP, OFFSET, UNIT, WORDS};

// units per row; rows of the matrix; rows that share an outer scale
struct Params { rows: u32, units: u32, limit: u32, outer_rows: u32 }

@group(0) @binding(0) var<storage, read> codes: array<u32>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read_write> values: array<vec4f>;
@group(0) @binding(3) var<storage, read> ids: array<i32>;
@group(0) @binding(4) var<storage, read> outer: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;

fn finished(v: vec4f, outer_scale: f32) -> vec4f {
  @if(divides) {
    let bits = bitcast<vec4u>(v);
    let most = bits & vec4u(0x7fffffffu);
    let by = bitcast<u32>(outer_scale);
    return bitcast<vec4f>((bits & vec4u(0x80000000u)) | vec4u(exact_quotient(most.x, by),
      exact_quotient(most.y, by), exact_quotient(most.z, by), exact_quotient(most.w, by)));
  }
  @else return v * outer_scale;
}

@compute @workgroup_size(WG)
fn dequantize(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / params.units;
  if (row >= params.rows) { return; }
  @if(gather) let from_row = u32(ids[row]);   // a negative id becomes a large one
  @else let from_row = row;
  let inside = from_row < params.limit;
  let at = min(from_row, params.limit - 1u) * params.units + i % params.units;
  var scale = scale_value(scales[scale_index(at)], at);
  if (!inside) { scale = 0.0; }
  var factor = 1.0;
  @if(outer) factor = outer[min(from_row, params.limit - 1u) / params.outer_rows];
  let first = i * (UNIT / 4u);
  for (var j = 0u; j < WORDS; j++) {
    let word = codes[at * WORDS + j];
    @if(e2m1) {
      values[first + 2u * j] = finished(small_values(word) * scale, factor);
      values[first + 2u * j + 1u] = finished(small_values(word >> 16u) * scale, factor);
    }
    @elif(e4m3 || e5m2) values[first + j] = finished(small_values(word) * scale, factor);
    @elif(q4) {
      values[first + 2u * j] = (raw(word) * STEP - OFFSET) * scale;
      values[first + 2u * j + 1u] = (raw(word >> 4u) * STEP - OFFSET) * scale;
    }
    @else values[first + j] = (raw(word) * STEP - OFFSET) * scale;
  }
}
