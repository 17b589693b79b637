// Gradients of bmm_chunk: dC_i[n] = sum_{j<=i} dCB_ij B_j[n],  dB_j[n] = sum_{i>=j} dCB_ij C_i[n], within each chunk.
//
// dCB [B,nC,G,Q,Q] (above the diagonal it is not read); C, B and their gradients [B,L,G,N]; f32 sums in order of position.
// `rows` takes B and gives dC, `columns` takes C and gives dB. One invocation computes a tile of 8 positions by 8 n.

import package::lib::index::workgroup_index;
import package::lib::tile::{next_quad, below, quad_indices};

struct Params {
  seqlen: u32,
  ngroups: u32,
  dstate: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nchunks * ceil(chunk_size / 8) * ngroups * ceil(dstate / 8)
}

@if(vec4) @group(0) @binding(0) var<storage, read> dCB: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> dCB: array<f32>;
@if(vec4) @group(0) @binding(1) var<storage, read> x: array<vec4f>;
@else @group(0) @binding(1) var<storage, read> x: array<f32>;
@if(vec4) @group(0) @binding(2) var<storage, read_write> out: array<vec4f>;
@else @group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

// Columns j, ..., j + 3 of row i of a chunk's matrix, zero where j > i.
@if(vec4) fn load_dCB(matrix: u32, i: u32, j: u32) -> vec4f {
  return select(vec4f(0.0), dCB[((matrix * params.chunk_size + i) * params.chunk_size + j) / 4u], below(j, i + 1u));
}
@else fn load_dCB(matrix: u32, i: u32, j: u32) -> vec4f {
  let at = quad_indices(matrix * params.chunk_size + i, j, params.chunk_size);
  return select(vec4f(0.0), vec4f(dCB[at.x], dCB[at.y], dCB[at.z], dCB[at.w]), below(j, i + 1u));
}

@if(vec4) fn load_x(row: u32, n: u32) -> vec4f {
  return x[(row * params.dstate + n) / 4u];
}
@else fn load_x(row: u32, n: u32) -> vec4f {
  let at = quad_indices(row, n, params.dstate);
  return vec4f(x[at.x], x[at.y], x[at.z], x[at.w]);
}

@if(vec4) fn store(row: u32, n: u32, value: vec4f) {
  out[(row * params.dstate + n) / 4u] = value;
}
@else fn store(row: u32, n: u32, value: vec4f) {
  for (var k = 0u; k < 4u && n + k < params.dstate; k++) {
    out[row * params.dstate + n + k] = value[k];
  }
}

struct Tile {
  n0: u32,
  g: u32,
  t0: u32, // in the chunk
  length: u32, // positions of the chunk that exist
  row: u32, // of the chunk's first position, in [B * L]
  matrix: u32, // of the chunk, in [B * nC * G]
}

fn tile_of(id: u32) -> Tile {
  let tiles_n = (params.dstate + 7u) / 8u;
  let tiles_t = (params.chunk_size + 7u) / 8u;
  let g = id / tiles_n % params.ngroups;
  let t = id / (tiles_n * params.ngroups);
  let c = t / tiles_t % params.nchunks;
  let b = t / (tiles_t * params.nchunks);
  let first = c * params.chunk_size;
  return Tile(id % tiles_n * 8u, g, t % tiles_t * 8u, min(params.chunk_size, params.seqlen - first),
    b * params.seqlen + first, (b * params.nchunks + c) * params.ngroups + g);
}

@compute @workgroup_size(WG)
fn rows(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  let tile = tile_of(id);
  if (id >= params.total || tile.t0 >= tile.length) {
    return;
  }
  let n0 = tile.n0;
  let n1 = next_quad(n0, params.dstate);
  // Rows past the end repeat the last one, and so store what it stores.
  let last = tile.length - 1u;
  let ia = min(tile.t0 + vec4u(0u, 1u, 2u, 3u), vec4u(last));
  let ib = min(tile.t0 + vec4u(4u, 5u, 6u, 7u), vec4u(last));
  let m = tile.matrix;
  var r0 = vec4f(); var r1 = vec4f(); var r2 = vec4f(); var r3 = vec4f();
  var r4 = vec4f(); var r5 = vec4f(); var r6 = vec4f(); var r7 = vec4f();
  var s0 = vec4f(); var s1 = vec4f(); var s2 = vec4f(); var s3 = vec4f();
  var s4 = vec4f(); var s5 = vec4f(); var s6 = vec4f(); var s7 = vec4f();
  for (var j = 0u; j <= ib.w; j += 4u) {
    let x4 = (tile.row + min(j + vec4u(0u, 1u, 2u, 3u), vec4u(last))) * params.ngroups + tile.g;
    let X0 = mat4x4f(load_x(x4.x, n0), load_x(x4.y, n0), load_x(x4.z, n0), load_x(x4.w, n0));
    let X1 = mat4x4f(load_x(x4.x, n1), load_x(x4.y, n1), load_x(x4.z, n1), load_x(x4.w, n1));
    let d0 = load_dCB(m, ia.x, j); r0 += X0 * d0; s0 += X1 * d0;
    let d1 = load_dCB(m, ia.y, j); r1 += X0 * d1; s1 += X1 * d1;
    let d2 = load_dCB(m, ia.z, j); r2 += X0 * d2; s2 += X1 * d2;
    let d3 = load_dCB(m, ia.w, j); r3 += X0 * d3; s3 += X1 * d3;
    let d4 = load_dCB(m, ib.x, j); r4 += X0 * d4; s4 += X1 * d4;
    let d5 = load_dCB(m, ib.y, j); r5 += X0 * d5; s5 += X1 * d5;
    let d6 = load_dCB(m, ib.z, j); r6 += X0 * d6; s6 += X1 * d6;
    let d7 = load_dCB(m, ib.w, j); r7 += X0 * d7; s7 += X1 * d7;
  }
  let ta = (tile.row + ia) * params.ngroups + tile.g;
  let tb = (tile.row + ib) * params.ngroups + tile.g;
  store(ta.x, n0, r0); store(ta.x, n1, s0);
  store(ta.y, n0, r1); store(ta.y, n1, s1);
  store(ta.z, n0, r2); store(ta.z, n1, s2);
  store(ta.w, n0, r3); store(ta.w, n1, s3);
  store(tb.x, n0, r4); store(tb.x, n1, s4);
  store(tb.y, n0, r5); store(tb.y, n1, s5);
  store(tb.z, n0, r6); store(tb.z, n1, s6);
  store(tb.w, n0, r7); store(tb.w, n1, s7);
}

@compute @workgroup_size(WG)
fn columns(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  let tile = tile_of(id);
  if (id >= params.total || tile.t0 >= tile.length) {
    return;
  }
  let n0 = tile.n0;
  let n1 = next_quad(n0, params.dstate);
  let j0 = tile.t0;
  let j1 = next_quad(j0, params.chunk_size);
  var r0 = vec4f(); var r1 = vec4f(); var r2 = vec4f(); var r3 = vec4f();
  var r4 = vec4f(); var r5 = vec4f(); var r6 = vec4f(); var r7 = vec4f();
  var s0 = vec4f(); var s1 = vec4f(); var s2 = vec4f(); var s3 = vec4f();
  var s4 = vec4f(); var s5 = vec4f(); var s6 = vec4f(); var s7 = vec4f();
  for (var i = j0; i < tile.length; i++) {
    let da = load_dCB(tile.matrix, i, j0);
    let db = load_dCB(tile.matrix, i, j1);
    let x0 = load_x((tile.row + i) * params.ngroups + tile.g, n0);
    let x1 = load_x((tile.row + i) * params.ngroups + tile.g, n1);
    r0 += da.x * x0; s0 += da.x * x1;
    r1 += da.y * x0; s1 += da.y * x1;
    r2 += da.z * x0; s2 += da.z * x1;
    r3 += da.w * x0; s3 += da.w * x1;
    r4 += db.x * x0; s4 += db.x * x1;
    r5 += db.y * x0; s5 += db.y * x1;
    r6 += db.z * x0; s6 += db.z * x1;
    r7 += db.w * x0; s7 += db.w * x1;
  }
  store_column(tile, j0, n0, n1, r0, s0); store_column(tile, j0 + 1u, n0, n1, r1, s1);
  store_column(tile, j0 + 2u, n0, n1, r2, s2); store_column(tile, j0 + 3u, n0, n1, r3, s3);
  store_column(tile, j1, n0, n1, r4, s4); store_column(tile, j1 + 1u, n0, n1, r5, s5);
  store_column(tile, j1 + 2u, n0, n1, r6, s6); store_column(tile, j1 + 3u, n0, n1, r7, s7);
}

fn store_column(tile: Tile, j: u32, n0: u32, n1: u32, value0: vec4f, value1: vec4f) {
  if (j < tile.length) {
    store((tile.row + j) * params.ngroups + tile.g, n0, value0);
    store((tile.row + j) * params.ngroups + tile.g, n1, value1);
  }
}
