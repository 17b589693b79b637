// The scan of Mamba-2, walking the tokens with the state in registers, for adapters emulated on a CPU:
//   S_t = kept_t S_{t-1} + dt_t x_t (outer) B_t,   y_t = S_t C_t + D x_t.
//
// x and y [B,L,H,P], B and C [B,L,G,N] (head h reads group h / (H/G)), steps from ssd_steps.wgsl,
// initial_state and final_state [B,H,P,N]. Sums in f32; no exponentials, and no product of shares exceeds 1.
// Source: Mamba-2, arXiv 2405.21060, sections 3 and 6, with chunks of four.
//
// A quad of invocations walks all tokens of a row with a piece of one head's state: 16 p, or 32 with the
// condition `p32`, by 16 n, or 32 with `n32`. It takes four tokens at a time: 24 quads are loaded for 2,300
// multiply-adds of an invocation. One launch walks with the pieces that begin at n = first_n; launches for
// later n add to y (condition `accumulate`). See lib/quad_scan.wgsl for who holds what.

import package::lib::index::workgroup_index;
import package::lib::quad_scan::{Tile, Token, Rows, reorder, entering, leaving, reaching};
import package::lib::quad_scan::{scale_tile, scale_token, add_token, weigh, apply, update};
import package::lib::quad_scan::{from_rows, to_rows};
@if(subgroups) import package::lib::quad_scan::{gather_tile, reduce_tile, reduce_pairs};
import package::lib::scan_loads::{load_B, load_C};

struct Params {
  seqlen: u32,
  nheads: u32,
  headdim: u32, // a multiple of 4
  ngroups: u32,
  dstate: u32, // a multiple of 16
  first_n: u32,
  blocks: u32, // ceil(seqlen / 4)
  total: u32, // quads: batch * nheads * ceil(headdim / 16 or 32)
  rows: u32, // 16, the rows of Rows
}

@group(0) @binding(0) var<storage, read> x: array<vec4f>;
@group(0) @binding(1) var<storage, read> B: array<vec4f>;
@group(0) @binding(2) var<storage, read> C: array<vec4f>;
@group(0) @binding(3) var<storage, read> steps: array<vec4f>;
@group(0) @binding(4) var<storage, read> initial_state: array<vec4f>; // read with `initial` only
@group(0) @binding(5) var<storage, read_write> y: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> final_state: array<vec4f>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;

@if(p32) const P_SPAN: u32 = 32u;
@else const P_SPAN: u32 = 16u;

// Sixteen p of a row of x, from quad p.x on. Quads past the end repeat the last one; what comes of them is
// not stored.
fn load_token(row: u32, p: vec4u) -> Token {
  let at = row + min(p, vec4u(params.headdim / 4u - 1u));
  return Token(x[at.x], x[at.y], x[at.z], x[at.w]);
}

fn store_token(row: u32, p: vec4u, sum: Token, skipped: Token) {
  if (p.x < params.headdim / 4u) { store(row + p.x, sum.a, skipped.a); }
  if (p.y < params.headdim / 4u) { store(row + p.y, sum.b, skipped.b); }
  if (p.z < params.headdim / 4u) { store(row + p.z, sum.c, skipped.c); }
  if (p.w < params.headdim / 4u) { store(row + p.w, sum.d, skipped.d); }
}

fn store(at: u32, sum: vec4f, skipped: vec4f) {
  @if(accumulate) y[at] += sum;
  @else y[at] = sum + skipped;
}

// Row `row` of the state, four n from n on, as an index.
fn cell(head: u32, row: u32, n: u32) -> u32 {
  return ((head * params.headdim + row) * params.dstate + n) / 4u;
}

// Each access stands in the program once, in a loop whose bound a compiler cannot know: one that stands there
// costs tens of milliseconds of compilation.
fn load_piece(head: u32, row: u32, n: u32) -> Tile {
  var rows = Rows();
  @if(initial) for (var j = 0u; j < params.rows; j++) {
    rows[j] = initial_state[cell(head, min(row + j, params.headdim - 1u), n)];
  }
  return from_rows(&rows);
}

fn store_piece(s: Tile, head: u32, row: u32, n: u32) {
  var rows = to_rows(s);
  for (var j = 0u; j < params.rows && row + j < params.headdim; j++) {
    final_state[cell(head, row + j, n)] = rows[j];
  }
}

@if(subgroups) @diagnostic(off, subgroup_uniformity) @compute @workgroup_size(WG)
fn ssd_walk(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = workgroup_index(wid, nwg) * (WG / 4u) + lane / 4u;
  if (id >= params.total) {
    return;
  }
  let q = lane % 4u;
  let order = vec4u(q) ^ vec4u(0u, 1u, 2u, 3u);
  let tiles = (params.headdim + P_SPAN - 1u) / P_SPAN;
  let head = id / tiles; // b * nheads + h
  let h = head % params.nheads;
  let b = head / params.nheads;
  let g = h / (params.nheads / params.ngroups);
  let row = id % tiles * P_SPAN;
  let p = row / 4u + vec4u(0u, 1u, 2u, 3u);
  let n = params.first_n + 4u * q;
  let step = head * (1u + 2u * params.blocks);
  let D = steps[step].x;

  var s0 = load_piece(head, row, n);
  @if(n32) var s1 = load_piece(head, row, n + 16u);
  @if(p32) var z0 = load_piece(head, row + 16u, n);
  @if(p32 && n32) var z1 = load_piece(head, row + 16u, n + 16u);
  for (var i = 0u; i < params.blocks; i++) {
    let dt = reorder(steps[step + 1u + 2u * i], q);
    let kept = steps[step + 2u + 2u * i];
    let enters = entering(kept);
    let leaves = dt * reorder(leaving(kept), q);
    let tokens = min(4u * i + order, vec4u(params.seqlen - 1u)) + b * params.seqlen;
    let x_row = (tokens.x * params.nheads + h) * (params.headdim / 4u);
    let own = load_token(x_row, p);
    let all = gather_tile(own);
    let added = scale_tile(all, leaves);
    @if(p32) let own2 = load_token(x_row, p + 4u);
    @if(p32) let all2 = gather_tile(own2);
    @if(p32) let added2 = scale_tile(all2, leaves);

    let at = ((tokens * params.ngroups + g) * params.dstate + n) / 4u;
    let b0 = load_B(at);
    let c0 = load_C(at);
    var pairs = transpose(b0) * c0; // column i: C of token i with the B of each
    var out = Tile();
    apply(&out, s0, c0);
    update(&s0, enters.w, added, b0);
    @if(p32) var out2 = Tile();
    @if(p32) apply(&out2, z0, c0);
    @if(p32) update(&z0, enters.w, added2, b0);
    @if(n32) {
      let b1 = load_B(at + 4u);
      let c1 = load_C(at + 4u);
      pairs += transpose(b1) * c1;
      apply(&out, s1, c1);
      update(&s1, enters.w, added, b1);
      @if(p32) apply(&out2, z1, c1);
      @if(p32) update(&z1, enters.w, added2, b1);
    }
    let weight = reduce_pairs(pairs) * dt * reorder(reaching(kept, q), q);
    let sum = add_token(scale_token(reduce_tile(out), enters[q]), weigh(all, weight));
    @if(p32) let sum2 = add_token(scale_token(reduce_tile(out2), enters[q]), weigh(all2, weight));
    if (4u * i + q < params.seqlen) {
      store_token(x_row, p, sum, scale_token(own, D));
      @if(p32) store_token(x_row, p + 4u, sum2, scale_token(own2, D));
    }
  }
  store_piece(s0, head, row, n);
  @if(n32) store_piece(s1, head, row, n + 16u);
  @if(p32) store_piece(z0, head, row + 16u, n);
  @if(p32 && n32) store_piece(z1, head, row + 16u, n + 16u);
}
