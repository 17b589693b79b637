// CB[b,c,g,i,j] = C_i . B_j for i >= j within each chunk, 0 above the diagonal and past the end of the row.
//
// C and B [B,L,G,N], CB [B,nC,G,Q,Q]; f32 sums in order of n. One invocation computes a tile of 8 i by 8 j (16 quads are
// loaded for 256 multiply-adds) or fills a tile above the diagonal.

import package::lib::index::workgroup_index;
import package::lib::tile::{next_quad, below, quad_indices, triangle};

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
  return select(vec4f(0.0), vec4f(C[at.x], C[at.y], C[at.z], C[at.w]), below(n, params.dstate));
}

@if(vec4) fn load_B(row: u32, n: u32) -> vec4f {
  return B[(row * params.dstate + n) / 4u];
}
@else fn load_B(row: u32, n: u32) -> vec4f {
  let at = quad_indices(row, n, params.dstate);
  return select(vec4f(0.0), vec4f(B[at.x], B[at.y], B[at.z], B[at.w]), below(n, params.dstate));
}

// Stores four columns of row i of a chunk's matrix, zero where j > i or i is past the end.
fn store(matrix: u32, i: u32, j: u32, length: u32, value: vec4f) {
  let kept = select(vec4f(0.0), value, below(j, select(0u, i + 1u, i < length)));
  @if(vec4) {
    CB[((matrix * params.chunk_size + i) * params.chunk_size + j) / 4u] = kept;
  }
  @else {
    for (var k = 0u; k < 4u && j + k < params.chunk_size; k++) {
      CB[(matrix * params.chunk_size + i) * params.chunk_size + j + k] = kept[k];
    }
  }
}

@compute @workgroup_size(WG)
fn bmm_chunk(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
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
  // The last tiles * (tiles - 1) / 2 numbers are the tiles above the diagonal: those strictly below it, mirrored.
  var tile = triangle(select(k - lower, k, k < lower));
  tile = select(vec2u(tile.y, tile.x + 1u), tile, k < lower);
  let i0 = 8u * tile.x;
  let j0 = 8u * tile.y;
  let j1 = next_quad(j0, params.chunk_size);
  // Rows past the end repeat the last one; what is stored for them is zero.
  let row = b * params.seqlen + first;
  let last = vec4u(length - 1u);
  let Ca = (row + min(i0 + vec4u(0u, 1u, 2u, 3u), last)) * params.ngroups + g;
  let Cb = (row + min(i0 + vec4u(4u, 5u, 6u, 7u), last)) * params.ngroups + g;
  let Ba = (row + min(j0 + vec4u(0u, 1u, 2u, 3u), last)) * params.ngroups + g;
  let Bb = (row + min(j1 + vec4u(0u, 1u, 2u, 3u), last)) * params.ngroups + g;

  var r0 = vec4f(); var r1 = vec4f(); var r2 = vec4f(); var r3 = vec4f();
  var r4 = vec4f(); var r5 = vec4f(); var r6 = vec4f(); var r7 = vec4f();
  var s0 = vec4f(); var s1 = vec4f(); var s2 = vec4f(); var s3 = vec4f();
  var s4 = vec4f(); var s5 = vec4f(); var s6 = vec4f(); var s7 = vec4f();
  let depth = select(0u, params.dstate, i0 >= j0 && i0 < length);
  for (var n = 0u; n < depth; n += 4u) {
    let B0 = mat4x4f(load_B(Ba.x, n), load_B(Ba.y, n), load_B(Ba.z, n), load_B(Ba.w, n));
    let B1 = mat4x4f(load_B(Bb.x, n), load_B(Bb.y, n), load_B(Bb.z, n), load_B(Bb.w, n));
    let c0 = load_C(Ca.x, n); r0 += c0 * B0; s0 += c0 * B1;
    let c1 = load_C(Ca.y, n); r1 += c1 * B0; s1 += c1 * B1;
    let c2 = load_C(Ca.z, n); r2 += c2 * B0; s2 += c2 * B1;
    let c3 = load_C(Ca.w, n); r3 += c3 * B0; s3 += c3 * B1;
    let c4 = load_C(Cb.x, n); r4 += c4 * B0; s4 += c4 * B1;
    let c5 = load_C(Cb.y, n); r5 += c5 * B0; s5 += c5 * B1;
    let c6 = load_C(Cb.z, n); r6 += c6 * B0; s6 += c6 * B1;
    let c7 = load_C(Cb.w, n); r7 += c7 * B0; s7 += c7 * B1;
  }
  let sums = array<vec4f, 16>(r0, s0, r1, s1, r2, s2, r3, s3, r4, s4, r5, s5, r6, s6, r7, s7);
  for (var k = 0u; k < 8u && i0 + k < params.chunk_size; k++) {
    store(matrix, i0 + k, j0, length, sums[2u * k]);
    store(matrix, i0 + k, j1, length, sums[2u * k + 1u]);
  }
}
