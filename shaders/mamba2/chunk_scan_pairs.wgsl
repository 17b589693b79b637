// dCB_ij = sum over the heads of the group of (dy_i . x_j) exp(a_i - a_j) dt_j for i >= j, 0 above the diagonal.
//
// dy and x [B,L,H,P], dt and dA_cumsum (= a) [B,H,nC,Q], dCB [B,nC,G,Q,Q]; f32 sums in order of h, then p. Pairs of different
// documents are 0 (start [B,nC,Q], see document_start.wgsl).
//
// `below_diagonal`: one invocation computes a tile of 8 i by 8 j strictly below the diagonal tiles, or fills the tile that
// mirrors it. There the decay is split into exp(a_i - a_i0) exp(a_i0 - a_j), both with exponents <= 0, and multiplied into
// dy and x, so that one set of accumulators serves all heads. `diagonal`: one invocation computes a quarter (4 by 4) of a
// diagonal tile, where no such split exists.

import package::lib::index::workgroup_index;
import package::lib::tile::{next_quad, below, quad_indices, triangle};

struct Params {
  seqlen: u32,
  nheads: u32,
  headdim: u32,
  ngroups: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nchunks * ngroups * T (T - 1) (below_diagonal) or 4 T (diagonal), T = ceil(chunk_size / 8)
}

@if(vec4) @group(0) @binding(0) var<storage, read> dy: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> dy: array<f32>;
@if(vec4) @group(0) @binding(1) var<storage, read> x: array<vec4f>;
@else @group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> dt: array<f32>;
@group(0) @binding(3) var<storage, read> dA_cumsum: array<f32>;
@group(0) @binding(4) var<storage, read> start: array<i32>; // read with the condition `documents` only
@if(vec4) @group(0) @binding(5) var<storage, read_write> dCB: array<vec4f>;
@else @group(0) @binding(5) var<storage, read_write> dCB: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(vec4) fn load_dy(row: u32, p: u32) -> vec4f {
  return dy[(row * params.headdim + p) / 4u];
}
@else fn load_dy(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return select(vec4f(0.0), vec4f(dy[at.x], dy[at.y], dy[at.z], dy[at.w]), below(p, params.headdim));
}

@if(vec4) fn load_x(row: u32, p: u32) -> vec4f {
  return x[(row * params.headdim + p) / 4u];
}
@else fn load_x(row: u32, p: u32) -> vec4f {
  let at = quad_indices(row, p, params.headdim);
  return select(vec4f(0.0), vec4f(x[at.x], x[at.y], x[at.z], x[at.w]), below(p, params.headdim));
}

fn load_a(chunk: u32, q: u32) -> vec4f {
  let at = quad_indices(chunk, q, params.chunk_size);
  return vec4f(dA_cumsum[at.x], dA_cumsum[at.y], dA_cumsum[at.z], dA_cumsum[at.w]);
}

fn load_dt(chunk: u32, q: u32) -> vec4f {
  let at = quad_indices(chunk, q, params.chunk_size);
  return vec4f(dt[at.x], dt[at.y], dt[at.z], dt[at.w]);
}

struct Chunk {
  b: u32,
  c: u32,
  g: u32,
  matrix: u32, // (b * nchunks + c) * ngroups + g
  row: u32, // of the chunk's first position, in [B * L]
  length: u32, // positions of the chunk that exist
}

fn chunk_of(matrix: u32) -> Chunk {
  let c = matrix / params.ngroups % params.nchunks;
  let b = matrix / (params.ngroups * params.nchunks);
  let first = c * params.chunk_size;
  return Chunk(b, c, matrix % params.ngroups, matrix, b * params.seqlen + first, min(params.chunk_size, params.seqlen - first));
}

// Stores columns j, ..., j + 3 of row i, zero across documents.
fn store(at: Chunk, i: u32, j: u32, value: vec4f) {
  if (i >= params.chunk_size) {
    return;
  }
  var kept = value;
  @if(documents) {
    let begin = start[(at.b * params.nchunks + at.c) * params.chunk_size + i];
    kept = select(kept, vec4f(0.0), vec4i(i32(j)) + vec4i(0, 1, 2, 3) < vec4i(begin));
  }
  let first = (at.matrix * params.chunk_size + i) * params.chunk_size + j;
  @if(vec4) {
    dCB[first / 4u] = kept;
  }
  @else {
    for (var k = 0u; k < 4u && j + k < params.chunk_size; k++) {
      dCB[first + k] = kept[k];
    }
  }
}

@compute @workgroup_size(WG)
fn below_diagonal(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let tiles = (params.chunk_size + 7u) / 8u;
  let lower = tiles * (tiles - 1u) / 2u;
  let k = id % (2u * lower);
  let at = chunk_of(id / (2u * lower));
  let tile = triangle(k % lower);
  let i0 = 8u * select(tile.y, tile.x + 1u, k < lower);
  let j0 = 8u * select(tile.x + 1u, tile.y, k < lower);
  let j1 = next_quad(j0, params.chunk_size);
  let last = vec4u(at.length - 1u);
  let ia = at.row + min(i0 + vec4u(0u, 1u, 2u, 3u), last);
  let ib = at.row + min(i0 + vec4u(4u, 5u, 6u, 7u), last);
  let ja = at.row + min(j0 + vec4u(0u, 1u, 2u, 3u), last);
  let jb = at.row + min(j1 + vec4u(0u, 1u, 2u, 3u), last);

  var r0 = vec4f(); var r1 = vec4f(); var r2 = vec4f(); var r3 = vec4f();
  var r4 = vec4f(); var r5 = vec4f(); var r6 = vec4f(); var r7 = vec4f();
  var s0 = vec4f(); var s1 = vec4f(); var s2 = vec4f(); var s3 = vec4f();
  var s4 = vec4f(); var s5 = vec4f(); var s6 = vec4f(); var s7 = vec4f();
  let heads = select(0u, params.nheads / params.ngroups, i0 > j0 && i0 < at.length);
  for (var h = at.g * heads; h < (at.g + 1u) * heads; h++) {
    let chunk = (at.b * params.nheads + h) * params.nchunks + at.c;
    let a_i0 = dA_cumsum[chunk * params.chunk_size + i0];
    // Rows past the end repeat the last one; their weight is zero.
    let fa = select(vec4f(0.0), exp(min(load_a(chunk, i0) - a_i0, vec4f(0.0))), below(i0, at.length));
    let fb = select(vec4f(0.0), exp(min(load_a(chunk, i0 + 4u) - a_i0, vec4f(0.0))), below(i0 + 4u, at.length));
    let ga = exp(min(a_i0 - load_a(chunk, j0), vec4f(0.0))) * load_dt(chunk, j0);
    let gb = exp(min(a_i0 - load_a(chunk, j1), vec4f(0.0))) * load_dt(chunk, j1);
    let da = ia * params.nheads + h;
    let db = ib * params.nheads + h;
    let xa = ja * params.nheads + h;
    let xb = jb * params.nheads + h;
    for (var p = 0u; p < params.headdim; p += 4u) {
      let X0 = mat4x4f(ga.x * load_x(xa.x, p), ga.y * load_x(xa.y, p), ga.z * load_x(xa.z, p), ga.w * load_x(xa.w, p));
      let X1 = mat4x4f(gb.x * load_x(xb.x, p), gb.y * load_x(xb.y, p), gb.z * load_x(xb.z, p), gb.w * load_x(xb.w, p));
      let d0 = fa.x * load_dy(da.x, p); r0 += d0 * X0; s0 += d0 * X1;
      let d1 = fa.y * load_dy(da.y, p); r1 += d1 * X0; s1 += d1 * X1;
      let d2 = fa.z * load_dy(da.z, p); r2 += d2 * X0; s2 += d2 * X1;
      let d3 = fa.w * load_dy(da.w, p); r3 += d3 * X0; s3 += d3 * X1;
      let d4 = fb.x * load_dy(db.x, p); r4 += d4 * X0; s4 += d4 * X1;
      let d5 = fb.y * load_dy(db.y, p); r5 += d5 * X0; s5 += d5 * X1;
      let d6 = fb.z * load_dy(db.z, p); r6 += d6 * X0; s6 += d6 * X1;
      let d7 = fb.w * load_dy(db.w, p); r7 += d7 * X0; s7 += d7 * X1;
    }
  }
  let sums = array<vec4f, 16>(r0, s0, r1, s1, r2, s2, r3, s3, r4, s4, r5, s5, r6, s6, r7, s7);
  for (var k = 0u; k < 8u; k++) {
    store(at, i0 + k, j0, sums[2u * k]);
    store(at, i0 + k, j1, sums[2u * k + 1u]);
  }
}

@compute @workgroup_size(WG)
fn diagonal(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let quarters = 4u * ((params.chunk_size + 7u) / 8u);
  let k = id % quarters;
  let at = chunk_of(id / quarters);
  let i0 = k / 4u * 8u + k / 2u % 2u * 4u;
  let j0 = k / 4u * 8u + k % 2u * 4u;
  if (i0 >= params.chunk_size || j0 >= params.chunk_size) {
    return;
  }
  let last = vec4u(at.length - 1u);
  let ia = at.row + min(i0 + vec4u(0u, 1u, 2u, 3u), last);
  let ja = at.row + min(j0 + vec4u(0u, 1u, 2u, 3u), last);
  var sum = mat4x4f(); // column k is row i0 + k of the tile
  let heads = select(0u, params.nheads / params.ngroups, i0 >= j0 && i0 < at.length);
  for (var h = at.g * heads; h < (at.g + 1u) * heads; h++) {
    let chunk = (at.b * params.nheads + h) * params.nchunks + at.c;
    let da = ia * params.nheads + h;
    let xa = ja * params.nheads + h;
    var U = mat4x4f();
    for (var p = 0u; p < params.headdim; p += 4u) {
      let X = transpose(mat4x4f(load_x(xa.x, p), load_x(xa.y, p), load_x(xa.z, p), load_x(xa.w, p)));
      U += X * mat4x4f(load_dy(da.x, p), load_dy(da.y, p), load_dy(da.z, p), load_dy(da.w, p));
    }
    let ai = load_a(chunk, i0);
    let aj = load_a(chunk, j0);
    let step = load_dt(chunk, j0);
    sum += mat4x4f(U[0] * exp(min(ai.x - aj, vec4f(0.0))) * step, U[1] * exp(min(ai.y - aj, vec4f(0.0))) * step,
      U[2] * exp(min(ai.z - aj, vec4f(0.0))) * step, U[3] * exp(min(ai.w - aj, vec4f(0.0))) * step);
  }
  for (var k = 0u; k < 4u; k++) {
    let columns = select(0u, i0 + k + 1u, i0 + k < at.length); // none past the end
    store(at, i0 + k, j0, select(vec4f(0.0), sum[k], below(j0, columns)));
  }
}
