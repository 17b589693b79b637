// Gradients of ssd_walk.wgsl for x, B, the initial state, dt and D, walking the tokens backwards with the
// gradient of the state in registers: L_t = dy_t (outer) C_t + kept_{t+1} L_{t+1},
//   dx_t = dt_t (L_t B_t) + D dy_t,   dB_t = dt_t sum over the heads of a group of x_t L_t.
//
// x, dy and dx [B,L,H,P], B and C [B,L,G,N], steps from ssd_steps.wgsl. dstates [chunks+1,B,H,P,N] holds in
// element `chunks` the gradient of the final state; element c becomes that of the state which enters chunk c.
// As a quad has sixteen of all p, what is summed over p or heads is left in parts, for sum_pieces.wgsl and
// ssd_steps_backward.wgsl, in one buffer of vec4f:
//   sums [B,H,4 blocks,tiles] of (x . L B, dt x . L B without the pair (t,t), dy . x, 0), and, from
//   pieces_at on, dB [pieces,B,L,G,n]; a piece is sixteen p of one of the group's heads.
//
// A quad walks with 16 p by 16 n of one head, or 32 n with `n32`, as in ssd_walk.wgsl; launches for later n
// add to dx (condition `accumulate`). 26 quads are loaded for 2,100 multiply-adds of an invocation.

import package::lib::index::workgroup_index;
import package::lib::quad_scan::{Tile, Token, Rows, reorder, entering, leaving, reached, scale_columns};
import package::lib::quad_scan::{scale_tile, scale_token, add_token, weigh, token_dots, token_dot};
import package::lib::quad_scan::{apply, apply_transposed, update, from_rows, to_rows};
@if(subgroups) import package::lib::quad_scan::{gather_tile, gather_pairs, reduce_tile, reduce_pairs};
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
@group(0) @binding(5) var<storage, read_write> dstates: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> dx: array<vec4f>;
@group(0) @binding(7) var<storage, read_write> parts: array<vec4f>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;
override CHUNK: u32 = 16; // blocks

@if(n32) const SPAN: u32 = 32u;
@else const SPAN: u32 = 16u;

fn store_dx(at: u32, p: u32, sum: vec4f, skipped: vec4f) {
  if (p < params.headdim / 4u) {
    @if(accumulate) dx[at + p] += sum;
    @else dx[at + p] = sum + skipped;
  }
}

fn cell(state: u32, row: u32, n: u32) -> u32 {
  return ((state * params.headdim + row) * params.dstate + n) / 4u;
}

fn load_piece(state: u32, row: u32, n: u32) -> Tile {
  var rows = Rows();
  for (var j = 0u; j < params.rows && row + j < params.headdim; j++) {
    rows[j] = dstates[cell(state, row + j, n)];
  }
  return from_rows(&rows);
}

fn store_piece(s: Tile, state: u32, row: u32, n: u32) {
  var rows = to_rows(s);
  for (var j = 0u; j < params.rows && row + j < params.headdim; j++) {
    dstates[cell(state, row + j, n)] = rows[j];
  }
}

fn store_dB(at: vec4u, exists: vec4<bool>, value: mat4x4f) {
  if (exists.x) { parts[at.x] = value[0]; }
  if (exists.y) { parts[at.y] = value[1]; }
  if (exists.z) { parts[at.z] = value[2]; }
  if (exists.w) { parts[at.w] = value[3]; }
}

@if(subgroups) @diagnostic(off, subgroup_uniformity) @compute @workgroup_size(WG)
fn ssd_walk_dx(
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
  let D = steps[step].x;
  let heads = params.batch * params.nheads;

  var s0 = load_piece(params.chunks * heads + head, row, n);
  @if(n32) var s1 = load_piece(params.chunks * heads + head, row, n + 16u);
  for (var c = params.chunks; c > 0u; c--) {
    for (var i = min(c * CHUNK, params.blocks); i > (c - 1u) * CHUNK; i--) {
      let first = 4u * (i - 1u);
      let dt = reorder(steps[step + 2u * i - 1u], q);
      let kept = steps[step + 2u * i];
      let leaves = reorder(leaving(kept), q);
      let reach = reorder(reached(kept, q), q);
      let exists = first + order < vec4u(params.seqlen);
      let tokens = min(first + order, vec4u(params.seqlen - 1u)) + b * params.seqlen;
      let x_row = (tokens.x * params.nheads + h) * (params.headdim / 4u);
      let own_x = load_x(x_row, p);
      let own_dy = scale_token(load_dy(x_row, p), select(0.0, 1.0, exists.x));
      let all_dy = gather_tile(own_dy);
      let all_x = gather_tile(own_x);
      let entered = scale_tile(all_dy, reorder(entering(kept), q));
      // Column j: dt_j times the pairs of token j with the tokens i that it reaches, by i.
      let weights = gather_pairs(token_dots(own_x, all_dy) * reach * dt.x);

      let at = ((tokens * params.ngroups + g) * params.dstate + n) / 4u;
      let out_row = ((part * params.batch * params.seqlen + tokens) * params.ngroups + g) * (SPAN / 4u) + q;
      let out_at = params.pieces_at + out_row;
      let b0 = load_B(at);
      let c0 = load_C(at);
      var pairs = transpose(c0) * b0; // column j: B of token j with the C of each
      var out = Tile();
      apply(&out, s0, b0);
      store_dB(out_at, exists, scale_columns(apply_transposed(s0, all_x), leaves * dt) + c0 * weights);
      update(&s0, kept.x * kept.y * kept.z * kept.w, entered, c0);
      @if(n32) {
        let b1 = load_B(at + 4u);
        let c1 = load_C(at + 4u);
        pairs += transpose(c1) * b1;
        apply(&out, s1, b1);
        store_dB(out_at + 4u, exists, scale_columns(apply_transposed(s1, all_x), leaves * dt) + c1 * weights);
        update(&s1, kept.x * kept.y * kept.z * kept.w, entered, c1);
      }
      // Of the pairs, (t,t) apart: it does not depend on any decay, and its gradient would drown theirs.
      let reach_pairs = reduce_pairs(pairs) * reach;
      let later = add_token(
        scale_token(reduce_tile(out), leaves.x), weigh(all_dy, vec4f(0.0, reach_pairs.yzw)));
      let skipped = scale_token(own_dy, select(0.0, 1.0, params.first_n == 0u)); // once for all n
      let z = add_token(later, scale_token(own_dy, reach_pairs.x));
      parts[(head * 4u * params.blocks + first + q) * params.tiles + params.first_tile + piece % tiles] =
        vec4f(token_dot(own_x, z), dt.x * token_dot(own_x, later), token_dot(own_x, skipped), 0.0);
      if (exists.x) {
        store_dx(x_row, p.x, dt.x * z.a, D * own_dy.a);
        store_dx(x_row, p.y, dt.x * z.b, D * own_dy.b);
        store_dx(x_row, p.z, dt.x * z.c, D * own_dy.c);
        store_dx(x_row, p.w, dt.x * z.d, D * own_dy.d);
      }
    }
    store_piece(s0, (c - 1u) * heads + head, row, n);
    @if(n32) store_piece(s1, (c - 1u) * heads + head, row, n + 16u);
  }
}
