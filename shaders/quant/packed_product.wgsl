// y = x W^T with both factors as packed codes with scales beside them.
//
// x [M, K], W [N, K] (lib/blocks.wgsl: e2m1, e4m3, e5m2), y f32 [M, N]; K is whole units of 16. x may be of
// the other eight-bit format: x_e4m3, x_e5m2. Factors share one scale along a block of `block` units:
//
//   y = f_x f_W * sum over blocks (s_x s_W * sum over the block of q_x q_W)
//
// in f32, k ascending. Values q stay without their scale within a block: for E2M1 such a sum is exact. The
// scales f of a row, a matrix or the tensor (condition `outer`) are multiplied in once, at the end.
//
// packed_quad, for adapters that are emulated on a CPU: a quad (four invocations) computes 16 rows x 16
// columns in registers, as in block_quad.wgsl. Invocation q owns four columns, decodes one row of x of every
// group of four, and sees those of its neighbours by quad swaps in the order q ^ 0 .. q ^ 3.
// packed_tile: a workgroup of 16 x 16 invocations computes 64 x 64, as in block_tile.wgsl: a unit of both is
// decoded into workgroup memory, along rows of x and columns of W^T, in lines of 17 vectors.
//
// Two ways for packed_tile to the same bits, where both factors are E2M1: `dots`: values times two are bytes,
// whose products are summed four at a time as whole numbers; `f16`: products and sums of eight of them in
// f16, which holds them exactly.
//
// `grouped`: the tiles are those of experts (lib/place.wgsl).

import package::lib::index::workgroup_index;
import package::lib::block4::{multiply_add, column_of};
import package::lib::blocks::small_values;
import package::lib::packed::{four, x_values, x_scale, w_scale, w_factors, add_block, put};
import package::lib::place::place_of;

const UNIT: u32 = 16;
const TILE: u32 = 64;
const LINE: u32 = 68;

// block: units that share a scale; group: 4, the rows of a group; outer_rows: rows that share an outer scale
struct Params {
  m: u32, n: u32, k: u32, row_tiles: u32, block: u32, group: u32, x_outer_rows: u32, outer_rows: u32,
}

@if(e2m1) @group(0) @binding(0) var<storage, read> x_codes: array<vec2u>;
@else @group(0) @binding(0) var<storage, read> x_codes: array<vec4u>;
@group(0) @binding(1) var<storage, read> x_scales: array<u32>;
@if(e2m1) @group(0) @binding(2) var<storage, read> codes: array<vec2u>;
@else @group(0) @binding(2) var<storage, read> codes: array<vec4u>;
@group(0) @binding(3) var<storage, read> scales: array<u32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
@group(0) @binding(5) var<storage, read> tiles: array<u32>;
@group(0) @binding(6) var<storage, read> x_outer: array<f32>;
@group(0) @binding(7) var<storage, read> outer: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;

// Quads enter and leave loops as a whole, which the uniformity analysis cannot see.
@if(subgroups) @diagnostic(off, subgroup_uniformity)
fn load_rows(v: vec4f) -> mat4x4f {
  return mat4x4f(v, quadSwapX(v), quadSwapY(v), quadSwapDiagonal(v));
}

@if(subgroups) @diagnostic(off, subgroup_uniformity)
fn load_scales(s: f32) -> vec4f {
  return vec4f(s, quadSwapX(s), quadSwapY(s), quadSwapDiagonal(s));
}

@if(subgroups) @compute @workgroup_size(WG)
fn packed_quad(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let place = place_of(workgroup_index(wid, nwg) * (WG / 4u) + lane / 4u, 16u);
  let row = place.row;
  if (row >= place.end) { return; }
  let q = lane % 4u;
  let plain = vec4u(0u, 1u, 2u, 3u);
  let column = place.column + q * 4u;

  // Rows and columns past the edge read the last one again; they are not stored.
  let units = params.k / UNIT;
  let owned = place.expert * params.n + min(column + plain, vec4u(params.n - 1u));
  let x_units = min(row + q + plain * 4u, vec4u(place.end - 1u)) * units;
  let w_units = owned * units;
  var s0 = mat4x4f();
  var s1 = mat4x4f();
  var s2 = mat4x4f();
  var s3 = mat4x4f();
  for (var b = 0u; b < units; b += params.block) {
    var p0 = mat4x4f();
    var p1 = mat4x4f();
    var p2 = mat4x4f();
    var p3 = mat4x4f();
    for (var i = b; i < b + params.block; i++) {
      let x0 = x_codes[x_units.x + i];
      let x1 = x_codes[x_units.y + i];
      let x2 = x_codes[x_units.z + i];
      let x3 = x_codes[x_units.w + i];
      let w0 = codes[w_units.x + i];
      let w1 = codes[w_units.y + i];
      let w2 = codes[w_units.z + i];
      let w3 = codes[w_units.w + i];
      // The bound is a uniform so that compilers do not unroll the loop.
      for (var step = 0u; step < params.group; step++) {
        let w = transpose(mat4x4f(small_values(four(w0, step)), small_values(four(w1, step)),
          small_values(four(w2, step)), small_values(four(w3, step))));
        p0 = multiply_add(p0, load_rows(x_values(four(x0, step))), w);
        p1 = multiply_add(p1, load_rows(x_values(four(x1, step))), w);
        p2 = multiply_add(p2, load_rows(x_values(four(x2, step))), w);
        p3 = multiply_add(p3, load_rows(x_values(four(x3, step))), w);
      }
    }
    let of_columns = vec4f(w_scale(w_units.x + b), w_scale(w_units.y + b), w_scale(w_units.z + b),
      w_scale(w_units.w + b));
    s0 = add_block(s0, p0, load_scales(x_scale(x_units.x + b)), of_columns);
    s1 = add_block(s1, p1, load_scales(x_scale(x_units.y + b)), of_columns);
    s2 = add_block(s2, p2, load_scales(x_scale(x_units.z + b)), of_columns);
    s3 = add_block(s3, p3, load_scales(x_scale(x_units.w + b)), of_columns);
  }

  if (column >= params.n) { return; }
  let factor = w_factors(owned);
  for (var i = 0u; i < params.group; i++) {
    let left = place.end - min(row + i, place.end);
    if (left > 0u) { put(column_of(s0, i ^ q), row + i, column, factor); }
    if (left > 4u) { put(column_of(s1, i ^ q), row + i + 4u, column, factor); }
    if (left > 8u) { put(column_of(s2, i ^ q), row + i + 8u, column, factor); }
    if (left > 12u) { put(column_of(s3, i ^ q), row + i + 12u, column, factor); }
  }
}

// Indexed by k, then by row or column: floats, so that a vector along k can be scattered.
@if(dots) alias Staged = u32;
@elif(f16) alias Staged = f16;
@else alias Staged = f32;
var<workgroup> x_staged: array<Staged, UNIT * LINE>;
var<workgroup> w_staged: array<Staged, UNIT * LINE>;
var<workgroup> x_scale_staged: array<f32, TILE>;
var<workgroup> w_scale_staged: array<f32, TILE>;

// Four neighbours of E2M1 times two, as signed bytes.
@if(dots) fn doubled(word: u32) -> u32 {
  let code = vec4u(word) >> vec4u(0u, 4u, 8u, 12u);
  let m = code & vec4u(7u);
  let size = select((2u + (m & vec4u(1u))) << (max(m >> vec4u(1u), vec4u(1u)) - 1u), m, m < vec4u(2u));
  let bytes = select(size, (256u - size) & vec4u(255u), (code & vec4u(8u)) != vec4u(0u));
  return bytes.x | (bytes.y << 8u) | (bytes.z << 16u) | (bytes.w << 24u);
}

@if(dots) fn dots_of(x: u32, at: u32) -> vec4i {
  return vec4i(dot4I8Packed(x, w_staged[at]), dot4I8Packed(x, w_staged[at + 1u]),
    dot4I8Packed(x, w_staged[at + 2u]), dot4I8Packed(x, w_staged[at + 3u]));
}

@compute @workgroup_size(16, 16)
fn packed_tile(
  @builtin(local_invocation_index) lane: u32, @builtin(local_invocation_id) lid: vec3u,
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
) {
  let place = place_of(workgroup_index(wid, nwg), TILE);
  let row = place.row;
  if (row >= place.end) { return; }
  let column = place.column;

  // This invocation stages four k of one row of each factor. Rows past the edge are the last one again.
  let own = lane / 4u;
  let part = lane % 4u;
  let units = params.k / UNIT;
  let x_units = min(row + own, place.end - 1u) * units;
  let w_units = (place.expert * params.n + min(column + own, params.n - 1u)) * units;
  var s = mat4x4f();                          // column i: row 4 lid.y + i
  var p = mat4x4f();
  for (var i = 0u; i < units; i++) {
    let x_four = four(x_codes[x_units + i], part);
    let w_four = four(codes[w_units + i], part);
    @if(!dots) let u = x_values(x_four);
    @if(!dots) let w = small_values(w_four);
    workgroupBarrier();
    @if(dots) {
      x_staged[part * LINE + own] = doubled(x_four);
      w_staged[part * LINE + own] = doubled(w_four);
    }
    @else {
      for (var j = 0u; j < 4u; j++) {
        x_staged[(part * 4u + j) * LINE + own] = Staged(u[j]);
        w_staged[(part * 4u + j) * LINE + own] = Staged(w[j]);
      }
    }
    if (part == 0u) { x_scale_staged[own] = x_scale(x_units + i); }
    if (part == 1u) { w_scale_staged[own] = w_scale(w_units + i); }
    workgroupBarrier();
    @if(dots) {
      var d0 = vec4i();
      var d1 = vec4i();
      var d2 = vec4i();
      var d3 = vec4i();
      for (var k = 0u; k < UNIT / 4u; k++) {
        let a = k * LINE + lid.y * 4u;
        let b = k * LINE + lid.x * 4u;
        d0 += dots_of(x_staged[a], b);
        d1 += dots_of(x_staged[a + 1u], b);
        d2 += dots_of(x_staged[a + 2u], b);
        d3 += dots_of(x_staged[a + 3u], b);
      }
      p += 0.25 * mat4x4f(vec4f(d0), vec4f(d1), vec4f(d2), vec4f(d3));
    }
    @elif(f16) {
      for (var half = 0u; half < UNIT; half += 8u) {
        var h = mat4x4h();
        for (var k = half; k < half + 8u; k++) {
          let a = k * LINE + lid.y * 4u;
          let b = k * LINE + lid.x * 4u;
          let v = vec4h(w_staged[b], w_staged[b + 1u], w_staged[b + 2u], w_staged[b + 3u]);
          h += mat4x4h(v * x_staged[a], v * x_staged[a + 1u], v * x_staged[a + 2u], v * x_staged[a + 3u]);
        }
        p += mat4x4f(h);
      }
    }
    @else for (var k = 0u; k < UNIT; k++) {
      let a = k * LINE + lid.y * 4u;
      let b = k * LINE + lid.x * 4u;
      let v = vec4f(w_staged[b], w_staged[b + 1u], w_staged[b + 2u], w_staged[b + 3u]);
      p = mat4x4f(fma(vec4f(x_staged[a]), v, p[0]), fma(vec4f(x_staged[a + 1u]), v, p[1]),
        fma(vec4f(x_staged[a + 2u]), v, p[2]), fma(vec4f(x_staged[a + 3u]), v, p[3]));
    }
    if ((i + 1u) % params.block == 0u) {
      let a = lid.y * 4u;
      let b = lid.x * 4u;
      s = add_block(s, p,
        vec4f(x_scale_staged[a], x_scale_staged[a + 1u], x_scale_staged[a + 2u], x_scale_staged[a + 3u]),
        vec4f(w_scale_staged[b], w_scale_staged[b + 1u], w_scale_staged[b + 2u], w_scale_staged[b + 3u]));
      p = mat4x4f();
    }
  }

  let first = column + lid.x * 4u;
  if (first >= params.n) { return; }
  let owned = place.expert * params.n + min(first + vec4u(0u, 1u, 2u, 3u), vec4u(params.n - 1u));
  let factor = w_factors(owned);
  for (var i = 0u; i < 4u; i++) {
    let to_row = row + lid.y * 4u + i;
    if (to_row < place.end) { put(s[i], to_row, first, factor); }
  }
}
