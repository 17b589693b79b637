// Gradients of ssd_walk.wgsl for C, and what the decays' gradients need of the states, walking the tokens
// once more with the state in registers:  dC_t = sum over the heads of a group of dy_t S_t.
//
// x and dy [B,L,H,P], B and C [B,L,G,N], steps from ssd_steps.wgsl, initial_state [B,H,P,N], dstates
// [chunks+1,B,H,P,N] from ssd_walk_dx.wgsl. Parts as there:
//   sums [B,H,blocks+chunks,tiles]: dy . (S C) without the pair (t,t) for the four tokens of each block, then
//   the product of state and its gradient at each chunk's end, in four summands; dC from pieces_at on.
//
// A quad walks with 16 p by 16 n of one head, or 32 n with `n32`, as in ssd_walk.wgsl. 26 quads are loaded
// for 2,100 multiply-adds of an invocation.

import package::lib::index::workgroup_index;
import package::lib::quad_scan::{Tile, Token, Rows, reorder, entering, leaving, reaching, scale_columns};
import package::lib::quad_scan::{scale_tile, scale_token, token_dots, apply_transposed, update, from_rows};
@if(subgroups) import package::lib::quad_scan::{gather, gather_tile, gather_pairs, reduce_pairs, reduce_own};
import package::lib::scan_loads::{load_B, load_C, load_dy, load_x};

struct Params {
  batch: u32,
  seqlen: u32,
  nheads: u32,
  headdim: u32, // a multiple of 4
  ngroups: u32,
  dstate: u32, // a multiple of 16
  first_n: u32,
  first_piece: u32,
  pieces: u32, // of each group, in this launch
  blocks: u32, // ceil(seqlen / 4)
  chunks: u32, // ceil(blocks / CHUNK)
  tiles: u32, // of a head: ceil(headdim / 16) times the launches for different n
  first_tile: u32, // of this launch's n
  pieces_at: u32,
  rows: u32, // 16, the rows of Rows
}

@group(0) @binding(0) var<storage, read> x: array<vec4f>;
@group(0) @binding(1) var<storage, read> B: array<vec4f>;
@group(0) @binding(2) var<storage, read> C: array<vec4f>;
@group(0) @binding(3) var<storage, read> steps: array<vec4f>;
@group(0) @binding(4) var<storage, read> dy: array<vec4f>;
@group(0) @binding(5) var<storage, read> initial_state: array<vec4f>; // read with `initial` only
@group(0) @binding(6) var<storage, read> dstates: array<vec4f>;
@group(0) @binding(7) var<storage, read_write> parts: array<vec4f>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;
override CHUNK: u32 = 16; // blocks

@if(n32) const SPAN: u32 = 32u;
@else const SPAN: u32 = 16u;

fn cell(state: u32, row: u32, n: u32) -> u32 {
  return ((state * params.headdim + row) * params.dstate + n) / 4u;
}

fn load_piece(head: u32, row: u32, n: u32) -> Tile {
  var rows = Rows();
  @if(initial) for (var j = 0u; j < params.rows && row + j < params.headdim; j++) {
    rows[j] = initial_state[cell(head, row + j, n)];
  }
  return from_rows(&rows);
}

// The product of a piece of the state with its gradient.
fn product(s: Tile, state: u32, row: u32, n: u32) -> vec4f {
  var rows = Rows();
  for (var j = 0u; j < params.rows && row + j < params.headdim; j++) {
    rows[j] = dstates[cell(state, row + j, n)];
  }
  let d = from_rows(&rows);
  return s.a[0] * d.a[0] + s.a[1] * d.a[1] + s.a[2] * d.a[2] + s.a[3] * d.a[3] +
    s.b[0] * d.b[0] + s.b[1] * d.b[1] + s.b[2] * d.b[2] + s.b[3] * d.b[3] +
    s.c[0] * d.c[0] + s.c[1] * d.c[1] + s.c[2] * d.c[2] + s.c[3] * d.c[3] +
    s.d[0] * d.d[0] + s.d[1] * d.d[1] + s.d[2] * d.d[2] + s.d[3] * d.d[3];
}

// Dot products of equal columns.
fn column_dots(x: mat4x4f, y: mat4x4f) -> vec4f {
  return vec4f(dot(x[0], y[0]), dot(x[1], y[1]), dot(x[2], y[2]), dot(x[3], y[3]));
}

fn store_dC(at: vec4u, exists: vec4<bool>, value: mat4x4f) {
  if (exists.x) { parts[at.x] = value[0]; }
  if (exists.y) { parts[at.y] = value[1]; }
  if (exists.z) { parts[at.z] = value[2]; }
  if (exists.w) { parts[at.w] = value[3]; }
}

@if(subgroups) @diagnostic(off, subgroup_uniformity) @compute @workgroup_size(WG)
fn ssd_walk_dC(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * (WG / 4u) + lane / 4u;
  if (id >= params.batch * params.ngroups * params.pieces) {
    return;
  }
  let q = lane % 4u;
  let order = vec4u(q) ^ vec4u(0u, 1u, 2u, 3u);
  let tiles = (params.headdim + 15u) / 16u;
  let part = id % params.pieces;
  let piece = params.first_piece + part;
  let g = id / params.pieces % params.ngroups;
  let b = id / (params.pieces * params.ngroups);
  let h = g * (params.nheads / params.ngroups) + piece / tiles;
  let head = b * params.nheads + h;
  let row = piece % tiles * 16u;
  let p = row / 4u + vec4u(0u, 1u, 2u, 3u);
  let n = params.first_n + 4u * q;
  let step = head * (1u + 2u * params.blocks);
  let heads = params.batch * params.nheads;
  let sums = head * (params.blocks + params.chunks) * params.tiles + params.first_tile + piece % tiles;

  var s0 = load_piece(head, row, n);
  @if(n32) var s1 = load_piece(head, row, n + 16u);
  for (var c = 0u; c < params.chunks; c++) {
    for (var i = c * CHUNK; i < min((c + 1u) * CHUNK, params.blocks); i++) {
      let dt = reorder(steps[step + 1u + 2u * i], q);
      let kept = steps[step + 2u + 2u * i];
      let enters = entering(kept);
      let enter = reorder(enters, q);
      let exists = 4u * i + order < vec4u(params.seqlen);
      let tokens = min(4u * i + order, vec4u(params.seqlen - 1u)) + b * params.seqlen;
      let x_row = (tokens.x * params.nheads + h) * (params.headdim / 4u);
      let own_dy = scale_token(load_dy(x_row, p), select(0.0, 1.0, exists.x));
      let all_x = gather_tile(load_x(x_row, p));
      let all_dy = gather_tile(own_dy);
      let added = scale_tile(all_x, dt * reorder(leaving(kept), q));
      // Column i: the pairs of token i with the tokens j that reach it, times dt_j, by j.
      let own_weights = token_dots(own_dy, all_x) * reorder(reaching(kept, q), q) * dt;
      let weights = gather_pairs(own_weights);

      let at = ((tokens * params.ngroups + g) * params.dstate + n) / 4u;
      let out_row = ((part * params.batch * params.seqlen + tokens) * params.ngroups + g) * (SPAN / 4u) + q;
      let out_at = params.pieces_at + out_row;
      let b0 = load_B(at);
      let c0 = load_C(at);
      var pairs = transpose(b0) * c0; // column i: C of token i with the B of each
      let through0 = scale_columns(apply_transposed(s0, all_dy), enter);
      var dots = column_dots(through0, c0);
      store_dC(out_at, exists, through0 + b0 * weights);
      update(&s0, enters.w, added, b0);
      @if(n32) {
        let b1 = load_B(at + 4u);
        let c1 = load_C(at + 4u);
        pairs += transpose(b1) * c1;
        let through1 = scale_columns(apply_transposed(s1, all_dy), enter);
        dots += column_dots(through1, c1);
        store_dC(out_at + 4u, exists, through1 + b1 * weights);
        update(&s1, enters.w, added, b1);
      }
      // Of the pairs, (t,t) apart: it does not depend on any decay, and its gradient would drown theirs.
      let own = reduce_own(dots) + dot(reduce_pairs(pairs).yzw, own_weights.yzw);
      let four = gather(vec4f(own));
      if (q == 0u) {
        parts[sums + i * params.tiles] = vec4f(four[0].x, four[1].x, four[2].x, four[3].x);
      }
    }
    var ends = product(s0, (c + 1u) * heads + head, row, n);
    @if(n32) ends += product(s1, (c + 1u) * heads + head, row, n + 16u);
    let all_ends = gather(ends);
    if (q == 0u) {
      parts[sums + (params.blocks + c) * params.tiles] =
        all_ends[0] + all_ends[1] + all_ends[2] + all_ends[3];
    }
  }
}
