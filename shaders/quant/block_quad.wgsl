// y = x W^T (+ bias, then relu2, then + residual) for many rows x and a block-quantised W, for adapters that
// are emulated on a CPU.
//
// x f32 [M, K], W [N, K] as codes and scales (lib/blocks.wgsl), y f32 [M, N]; K is whole units. A quad
// (four invocations) computes 16 rows x 16 columns of y in registers, as in matmul_quad.wgsl: invocation q
// owns four columns, loads one row of x of every group of four, and sees the rows of its neighbours by quad
// swaps in the order q ^ 0 .. q ^ 3. The codes of a whole unit of W are loaded at a time and decoded four k
// at a time, so that W costs one vector load where f32 costs eight. WG / 4 tiles per workgroup.
//
// `grouped`: the tiles are those of experts (lib/place.wgsl). Accumulation: f32, one accumulator per element,
// k ascending.

import package::lib::index::workgroup_index;
import package::lib::block4::{multiply_add, column_of};
import package::lib::blocks::{raw, scaled_values, scale_index, scale_value, UNIT, WORDS};
import package::lib::place::place_of;

// group: 4, the rows of a group; outer_rows: rows of W that share an outer scale
struct Params { m: u32, n: u32, k: u32, row_tiles: u32, group: u32, outer_rows: u32 }

@group(0) @binding(0) var<storage, read> x: array<vec4f>;
@if(e2m1) @group(0) @binding(1) var<storage, read> codes: array<vec2u>;
@else @group(0) @binding(1) var<storage, read> codes: array<vec4u>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> tiles: array<u32>;
@group(0) @binding(6) var<storage, read> residual: array<f32>;
@group(0) @binding(7) var<storage, read> outer: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;
// The codes of one unit in four columns.
@if(e2m1) struct Codes { a: vec2u, b: vec2u, c: vec2u, d: vec2u }
@elif(q4 || e4m3 || e5m2) struct Codes { a: vec4u, b: vec4u, c: vec4u, d: vec4u }
@else struct Codes {
  a: vec4u, b: vec4u, c: vec4u, d: vec4u, a_last: vec4u, b_last: vec4u, c_last: vec4u, d_last: vec4u,
}

fn load_codes(i: vec4u) -> Codes {
  @if(q4 || e2m1 || e4m3 || e5m2) return Codes(codes[i.x], codes[i.y], codes[i.z], codes[i.w]);
  @else return Codes(codes[2u * i.x], codes[2u * i.y], codes[2u * i.z], codes[2u * i.w],
    codes[2u * i.x + 1u], codes[2u * i.y + 1u], codes[2u * i.z + 1u], codes[2u * i.w + 1u]);
}

// Component i of a vector. Indexing would send the vector through memory.
@if(e2m1) fn pick(v: vec2u, i: u32) -> u32 {
  return select(v.x, v.y, i == 1u);
}
@else fn pick(v: vec4u, i: u32) -> u32 {
  return select(select(v.x, v.y, i == 1u), select(v.z, v.w, i == 3u), i >= 2u);
}

// Four columns at the four k number `step` of the unit; column j of the result is k number j.
fn columns_at(c: Codes, step: u32, scale: vec4f) -> mat4x4f {
  @if(e2m1) {
    let i = step / 2u;
    let words = vec4u(pick(c.a, i), pick(c.b, i), pick(c.c, i), pick(c.d, i)) >> vec4u(step % 2u * 16u);
    return decoded(words, scale);
  }
  @elif(q4) {
    let i = step / 2u;
    let words = vec4u(pick(c.a, i), pick(c.b, i), pick(c.c, i), pick(c.d, i)) >> vec4u(step % 2u * 4u);
    return decoded(words, scale);
  }
  @elif(e4m3 || e5m2) {
    return decoded(vec4u(pick(c.a, step), pick(c.b, step), pick(c.c, step), pick(c.d, step)), scale);
  }
  @else {
    let i = step % 4u;
    if (step < 4u) { return decoded(vec4u(pick(c.a, i), pick(c.b, i), pick(c.c, i), pick(c.d, i)), scale); }
    return decoded(
      vec4u(pick(c.a_last, i), pick(c.b_last, i), pick(c.c_last, i), pick(c.d_last, i)), scale);
  }
}

fn decoded(words: vec4u, scale: vec4f) -> mat4x4f {
  return transpose(mat4x4f(scaled_values(words.x, scale.x), scaled_values(words.y, scale.y),
    scaled_values(words.z, scale.z), scaled_values(words.w, scale.w)));
}

// Quads enter and leave loops as a whole, which the uniformity analysis cannot see.
@if(subgroups) @diagnostic(off, subgroup_uniformity)
fn load_rows(at: u32) -> mat4x4f {
  let v = x[at];
  return mat4x4f(v, quadSwapX(v), quadSwapY(v), quadSwapDiagonal(v));
}

fn put(value: vec4f, row: u32, column: u32, count: u32) {
  let at = row * params.n + column;
  var v = value;
  @if(relu2) v = max(v, vec4f()) * max(v, vec4f());
  for (var i = 0u; i < count; i++) {
    @if(residual) v[i] += residual[at + i];
    y[at + i] = v[i];
  }
}

@if(subgroups) @compute @workgroup_size(WG)
fn block_quad(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let place = place_of(workgroup_index(wid, nwg) * (WG / 4u) + lane / 4u, 16u);
  let row = place.row;
  let row_end = place.end;
  if (row >= row_end) { return; }
  let q = lane % 4u;
  let plain = vec4u(0u, 1u, 2u, 3u);
  let column = place.column + q * 4u;

  // Rows and columns past the edge read the last one again; they are not stored.
  let vectors = params.k / 4u;
  let rows = min(row + q + plain * 4u, vec4u(row_end - 1u)) * vectors;
  let units = params.k / UNIT;
  let owned = place.expert * params.n + min(column + plain, vec4u(params.n - 1u));
  let columns = owned * units;
  var s0 = mat4x4f();
  var s1 = mat4x4f();
  var s2 = mat4x4f();
  var s3 = mat4x4f();
  for (var b = 0u; b < units; b++) {
    let at = columns + b;
    let c = load_codes(at);
    let scale = vec4f(
      scale_value(scales[scale_index(at.x)], at.x), scale_value(scales[scale_index(at.y)], at.y),
      scale_value(scales[scale_index(at.z)], at.z), scale_value(scales[scale_index(at.w)], at.w));
    // The bound is a uniform so that compilers do not unroll the loop.
    for (var step = 0u; step < params.group * (UNIT / 16u); step++) {
      let k = b * (UNIT / 4u) + step;
      let w = columns_at(c, step, scale);
      s0 = multiply_add(s0, load_rows(rows.x + k), w);
      s1 = multiply_add(s1, load_rows(rows.y + k), w);
      s2 = multiply_add(s2, load_rows(rows.z + k), w);
      s3 = multiply_add(s3, load_rows(rows.w + k), w);
    }
  }

  if (column >= params.n) { return; }
  let count = min(4u, params.n - column);
  var factor = vec4f(1.0);
  @if(outer) {
    let f = owned / params.outer_rows;
    factor = vec4f(outer[f.x], outer[f.y], outer[f.z], outer[f.w]);
  }
  var added = vec4f();
  @if(bias) let i = min(column + plain, vec4u(params.n - 1u));
  @if(bias) added = vec4f(bias[i.x], bias[i.y], bias[i.z], bias[i.w]);
  for (var i = 0u; i < params.group; i++) {
    let left = row_end - min(row + i, row_end);
    let first = row + i;
    if (left > 0u) { put(column_of(s0, i ^ q) * factor + added, first, column, count); }
    if (left > 4u) { put(column_of(s1, i ^ q) * factor + added, first + 4u, column, count); }
    if (left > 8u) { put(column_of(s2, i ^ q) * factor + added, first + 8u, column, count); }
    if (left > 12u) { put(column_of(s3, i ^ q) * factor + added, first + 12u, column, count); }
  }
}
