// CB[b,c,g,i,j] = C_i . B_j for i >= j within each chunk, 0 above the diagonal and past the end of the row.
//
// C and B [B,L,G,N], CB [B,nC,G,Q,Q]; f32 sums in order of n. One invocation computes a tile of 8 i by 8 j
// (16 quads are loaded for 256 multiply-adds) or fills a tile above the diagonal.

import package::lib::index::workgroup_index;
import package::lib::tile::{Tile, add_dots, sums_of, next_quad, four, below, quad_indices, triangle};

struct Params {
  seqlen: u32,
  ngroups: u32,
  dstate: u32,
  nchunks: u32,
  chunk_size: u32,
  total: u32, // batch * nchunks * ngroups * ceil(chunk_size / 8)^2
}

@if(vec4) @group(0) @binding(0) var<storage, read> C: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> C: array<f32>;
@if(vec4) @group(0) @binding(1) var<storage, read> B: array<vec4f>;
@else @group(0) @binding(1) var<storage, read> B: array<f32>;
@if(vec4) @group(0) @binding(2) var<storage, read_write> CB: array<vec4f>;
@else @group(0) @binding(2) var<storage, read_write> CB: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 64;

@if(vec4) fn load_C(row: u32, n: u32) -> vec4f {
  return C[(row * params.dstate + n) / 4u];
}
@else fn load_C(row: u32, n: u32) -> vec4f {
  let at = quad_indices(row, n, params.dstate);
  return select(vec4f(), vec4f(C[at.x], C[at.y], C[at.z], C[at.w]), below(n, params.dstate));
}

@if(vec4) fn load_B(row: u32, n: u32) -> vec4f {
  return B[(row * params.dstate + n) / 4u];
}
@else fn load_B(row: u32, n: u32) -> vec4f {
  let at = quad_indices(row, n, params.dstate);
  return select(vec4f(), vec4f(B[at.x], B[at.y], B[at.z], B[at.w]), below(n, params.dstate));
}

fn C_rows(rows: vec4u, n: u32) -> mat4x4f {
  return mat4x4f(load_C(rows.x, n), load_C(rows.y, n), load_C(rows.z, n), load_C(rows.w, n));
}

fn B_rows(rows: vec4u, n: u32) -> mat4x4f {
  return mat4x4f(load_B(rows.x, n), load_B(rows.y, n), load_B(rows.z, n), load_B(rows.w, n));
}

@if(vec4) fn store(row: u32, j: u32, value: vec4f) {
  CB[(row * params.chunk_size + j) / 4u] = value;
}
@else fn store(row: u32, j: u32, value: vec4f) {
  for (var k = 0u; k < 4u && j + k < params.chunk_size; k++) {
    CB[row * params.chunk_size + j + k] = value[k];
  }
}

@compute @workgroup_size(WG)
fn bmm_chunk(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * WG + lane;
  if (id >= params.total) {
    return;
  }
  let tiles = (params.chunk_size + 7u) / 8u;
  let lower = tiles * (tiles + 1u) / 2u;
  let k = id % (tiles * tiles);
  let matrix = id / (tiles * tiles); // (b * nchunks + c) * ngroups + g
  let g = matrix % params.ngroups;
  let c = matrix / params.ngroups % params.nchunks;
  let b = matrix / (params.ngroups * params.nchunks);
  let first = c * params.chunk_size;
  let length = min(params.chunk_size, params.seqlen - first);
  // The last tiles * (tiles - 1) / 2 numbers are the tiles above the diagonal, those below it mirrored.
  var place = triangle(select(k - lower, k, k < lower));
  place = select(vec2u(place.y, place.x + 1u), place, k < lower);
  let i0 = 8u * place.x;
  let j0 = 8u * place.y;
  let j1 = next_quad(j0, params.chunk_size);
  // Rows past the end repeat the last one; what is stored for them is zero.
  let row = b * params.seqlen + first;
  let Ca = (row + four(i0, length - 1u)) * params.ngroups + g;
  let Cb = (row + four(i0 + 4u, length - 1u)) * params.ngroups + g;
  let Ba = (row + four(j0, length - 1u)) * params.ngroups + g;
  let Bb = (row + four(j1, length - 1u)) * params.ngroups + g;

  var tile = Tile();
  let depth = select(0u, params.dstate, i0 >= j0 && i0 < length);
  for (var n = 0u; n < depth; n += 4u) {
    add_dots(&tile, C_rows(Ca, n), C_rows(Cb, n), B_rows(Ba, n), B_rows(Bb, n));
  }
  let sums = sums_of(tile);
  for (var r = 0u; r < 8u && i0 + r < params.chunk_size; r++) {
    let columns = select(0u, i0 + r + 1u, i0 + r < length); // none past the end
    let at = matrix * params.chunk_size + i0 + r;
    store(at, j0, select(vec4f(), sums[2u * r], below(j0, columns)));
    store(at, j1, select(vec4f(), sums[2u * r + 1u], below(j1, columns)));
  }
}
