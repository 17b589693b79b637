// Gradients of bmm_chunk: dC_i[n] = sum_{j<=i} dCB_ij B_j[n],  dB_j[n] = sum_{i>=j} dCB_ij C_i[n], by chunks.
//
// dCB [B,nC,G,Q,Q] (above the diagonal it is not read); C, B and their gradients [B,L,G,N]; f32 sums in order
// of position. `rows` takes x = B and gives out = dC, `columns` takes x = C and gives out = dB.
// One invocation computes a tile of 8 positions by 8 n.

import package::lib::index::workgroup_index;
import package::lib::tile::{Tile, add_outer, sums_of, next_quad, four, quad_indices};

struct Params {
  seqlen: u32,
  ngroups: u32,
  dstate: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nchunks * ceil(chunk_size / 8) * ngroups * ceil(dstate / 8)
}

@group(0) @binding(0) var<storage, read> dCB: array<f32>;
@if(vec4) @group(0) @binding(1) var<storage, read> x: array<vec4f>;
@else @group(0) @binding(1) var<storage, read> x: array<f32>;
@if(vec4) @group(0) @binding(2) var<storage, read_write> out: array<vec4f>;
@else @group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

fn load_dCB(at: vec4u) -> vec4f {
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

struct Place {
  n0: u32,
  g: u32,
  t0: u32, // in the chunk
  length: u32, // positions of the chunk that exist
  row: u32, // of the chunk's first position, in [B * L]
  matrix: u32, // row 0 of the chunk's matrix, in [B * nC * G * Q]
}

fn place_of(id: u32) -> Place {
  let tiles_n = (params.dstate + 7u) / 8u;
  let tiles_t = (params.chunk_size + 7u) / 8u;
  let g = id / tiles_n % params.ngroups;
  let t = id / (tiles_n * params.ngroups);
  let c = t / tiles_t % params.nchunks;
  let b = t / (tiles_t * params.nchunks);
  let first = c * params.chunk_size;
  return Place(id % tiles_n * 8u, g, t % tiles_t * 8u, min(params.chunk_size, params.seqlen - first),
    b * params.seqlen + first, ((b * params.nchunks + c) * params.ngroups + g) * params.chunk_size);
}

@compute @workgroup_size(WG)
fn rows(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  let at = place_of(id);
  if (id >= params.total || at.t0 >= at.length) {
    return;
  }
  let n1 = next_quad(at.n0, params.dstate);
  // Rows past the end repeat the last one and are not stored.
  let ia = four(at.t0, at.length - 1u);
  let ib = four(at.t0 + 4u, at.length - 1u);
  let da = (at.matrix + ia) * params.chunk_size;
  let db = (at.matrix + ib) * params.chunk_size;
  var tile = Tile();
  for (var j = 0u; j <= ib.w; j++) {
    let row = (at.row + j) * params.ngroups + at.g;
    add_outer(&tile, select(vec4f(), load_dCB(da + j), vec4u(j) <= ia),
      select(vec4f(), load_dCB(db + j), vec4u(j) <= ib), load_x(row, at.n0), load_x(row, n1));
  }
  let sums = sums_of(tile);
  for (var k = 0u; k < 8u && at.t0 + k < at.length; k++) {
    let row = (at.row + at.t0 + k) * params.ngroups + at.g;
    store(row, at.n0, sums[2u * k]);
    store(row, n1, sums[2u * k + 1u]);
  }
}

@compute @workgroup_size(WG)
fn columns(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  let at = place_of(id);
  if (id >= params.total || at.t0 >= at.length) {
    return;
  }
  let n1 = next_quad(at.n0, params.dstate);
  let ja = four(at.t0, params.chunk_size - 1u);
  let jb = four(at.t0 + 4u, params.chunk_size - 1u);
  var tile = Tile();
  for (var i = at.t0; i < at.length; i++) {
    let d = (at.matrix + i) * params.chunk_size;
    let row = (at.row + i) * params.ngroups + at.g;
    add_outer(&tile, select(vec4f(), load_dCB(d + ja), ja <= vec4u(i)),
      select(vec4f(), load_dCB(d + jb), jb <= vec4u(i)), load_x(row, at.n0), load_x(row, n1));
  }
  let sums = sums_of(tile);
  for (var k = 0u; k < 8u && at.t0 + k < at.length; k++) {
    let row = (at.row + at.t0 + k) * params.ngroups + at.g;
    store(row, at.n0, sums[2u * k]);
    store(row, n1, sums[2u * k + 1u]);
  }
}
