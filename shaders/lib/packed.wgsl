// What the kernels of products of two packed factors share. The importing file declares x_scales, scales,
// x_outer, outer, y, params.n, params.outer_rows and params.x_outer_rows.

import package::lib::blocks::{small_values, e4m3_values, e5m2_values, scale_index, scale_value};

// Four neighbours, number `step` of a unit, in the lowest bits. Indexing would send the unit through memory.
@if(e2m1) fn four(unit: vec2u, step: u32) -> u32 {
  return select(unit.x, unit.y, step >= 2u) >> (step % 2u * 16u);
}
@else fn four(unit: vec4u, step: u32) -> u32 {
  return select(select(unit.x, unit.y, step == 1u), select(unit.z, unit.w, step == 3u), step >= 2u);
}

fn x_values(word: u32) -> vec4f {
  @if(x_e4m3) return e4m3_values(word);
  @elif(x_e5m2) return e5m2_values(word);
  @else return small_values(word);
}

fn x_scale(at: u32) -> f32 {
  return scale_value(x_scales[scale_index(at)], at);
}

fn w_scale(at: u32) -> f32 {
  return scale_value(scales[scale_index(at)], at);
}

fn w_factors(rows: vec4u) -> vec4f {
  let at = rows / params.outer_rows;
  @if(outer) return vec4f(outer[at.x], outer[at.y], outer[at.z], outer[at.w]);
  @else return vec4f(1.0);
}

// s + the sums p of a block times the scales of its rows and columns.
fn add_block(s: mat4x4f, p: mat4x4f, of_rows: vec4f, of_columns: vec4f) -> mat4x4f {
  return mat4x4f(fma(p[0], of_rows.x * of_columns, s[0]), fma(p[1], of_rows.y * of_columns, s[1]),
    fma(p[2], of_rows.z * of_columns, s[2]), fma(p[3], of_rows.w * of_columns, s[3]));
}

// Four sums of a row, as many as lie within the matrix.
fn put(sums: vec4f, row: u32, column: u32, factor: vec4f) {
  var value = sums;
  @if(outer) value *= x_outer[row / params.x_outer_rows] * factor;
  for (var i = 0u; i < min(4u, params.n - column); i++) { y[row * params.n + column + i] = value[i]; }
}
