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

// Four elements of dCB from anywhere.
@if(vec4) fn gather(at: vec4u) -> vec4f {
  let quad = at / 4u;
  let part = at % 4u;
  return vec4f(dCB[quad.x][part.x], dCB[quad.y][part.y], dCB[quad.z][part.z], dCB[quad.w][part.w]);
}
@else fn gather(at: vec4u) -> vec4f {
  return vec4f(dCB[at.x], dCB[at.y], dCB[at.z], dCB[at.w]);
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

fn store_row(tile: Tile, t: u32, n0: u32, n1: u32, value0: vec4f, value1: vec4f) {
  if (t < tile.length) {
    store((tile.row + t) * params.ngroups + tile.g, n0, value0);
    store((tile.row + t) * params.ngroups + tile.g, n1, value1);
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
  // Rows past the end repeat the last one and are not stored.
  let last = vec4u(tile.length - 1u);
  let ia = min(tile.t0 + vec4u(0u, 1u, 2u, 3u), last);
  let ib = min(tile.t0 + vec4u(4u, 5u, 6u, 7u), last);
  let da = (tile.matrix * params.chunk_size + ia) * params.chunk_size;
  let db = (tile.matrix * params.chunk_size + ib) * params.chunk_size;
  var r0 = vec4f(); var r1 = vec4f(); var r2 = vec4f(); var r3 = vec4f();
  var r4 = vec4f(); var r5 = vec4f(); var r6 = vec4f(); var r7 = vec4f();
  var s0 = vec4f(); var s1 = vec4f(); var s2 = vec4f(); var s3 = vec4f();
  var s4 = vec4f(); var s5 = vec4f(); var s6 = vec4f(); var s7 = vec4f();
  for (var j = 0u; j <= ib.w; j++) {
    let wa = select(vec4f(0.0), gather(da + j), vec4u(j) <= ia);
    let wb = select(vec4f(0.0), gather(db + j), vec4u(j) <= ib);
    let x0 = load_x((tile.row + j) * params.ngroups + tile.g, n0);
    let x1 = load_x((tile.row + j) * params.ngroups + tile.g, n1);
    r0 += wa.x * x0; s0 += wa.x * x1;
    r1 += wa.y * x0; s1 += wa.y * x1;
    r2 += wa.z * x0; s2 += wa.z * x1;
    r3 += wa.w * x0; s3 += wa.w * x1;
    r4 += wb.x * x0; s4 += wb.x * x1;
    r5 += wb.y * x0; s5 += wb.y * x1;
    r6 += wb.z * x0; s6 += wb.z * x1;
    r7 += wb.w * x0; s7 += wb.w * x1;
  }
  let sums = array<vec4f, 16>(r0, s0, r1, s1, r2, s2, r3, s3, r4, s4, r5, s5, r6, s6, r7, s7);
  for (var k = 0u; k < 8u; k++) {
    store_row(tile, tile.t0 + k, n0, n1, sums[2u * k], sums[2u * k + 1u]);
  }
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
  let sums = array<vec4f, 16>(r0, s0, r1, s1, r2, s2, r3, s3, r4, s4, r5, s5, r6, s6, r7, s7);
  for (var k = 0u; k < 8u; k++) {
    store_row(tile, select(j1 + k - 4u, j0 + k, k < 4u), n0, n1, sums[2u * k], sums[2u * k + 1u]);
  }
}
