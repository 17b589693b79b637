/** The launches that attention is made of: by all keys at once (`attention.ts`) or from rank to rank. */
import { launch } from "../kernel/launch.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { copyColumns } from "./elementwise.ts";

/**
 * Which keys a query sees (shaders/lib/sight.wgsl): query t the first
 * clamp(t + 1 + (t < turn ? early : reach), 0, limit).
 */
export interface Sight {
  readonly turn: number;
  readonly early: number;
  readonly reach: number;
  readonly limit: number;
}

/** i32 numbers of documents; where those of queries [B, L] and of keys [B, Lk] begin in `numbers`. */
export interface Documents {
  readonly numbers: Tensor;
  readonly q_docs: number;
  readonly k_docs: number;
}

export interface AttentionCall {
  readonly scale: number;
  readonly sight: Sight;
  readonly documents: Documents | null;
  /** Which kernels compute it; undefined: those that suit the adapter. */
  readonly kernel: "team" | "tile" | undefined;
}

const TEAM_WG = 8; // invocations of a workgroup of teams
const TEAM_ROWS = 16;
const TILE_ROWS = 32; // rows of a workgroup tile
const WG = 64;

/**
 * Two structures compute the same: teams of four or eight invocations with everything in their registers, for
 * adapters where loads and barriers are dear, and workgroup tiles, for GPUs and without subgroups.
 */
function plan(q: Tensor, k: Tensor, { scale, sight, documents, kernel }: AttentionCall) {
  const [batch, seqlen, nheads, Dh] = q.shape as [number, number, number, number];
  const [, kv_seqlen, nkv_heads] = k.shape as [number, number, number];
  const { info, hasSubgroups } = q.device;
  const tiled = !hasSubgroups || (kernel === undefined ? !info.isSoftware : kernel === "tile");
  const conditions = documents ? ["seq_idx" as const] : [];
  const octo = info.subgroupMinSize === 8 && info.subgroupMaxSize === 8;
  const lanes = octo ? 8 : 4;
  const slabs = Math.ceil(Dh / (16 * lanes)); // parts of a head's width
  const constants = { HEAD_VEC4: Dh / 4 };
  const params = {
    batch, seqlen, kv_seqlen, nheads, nkv_heads, ...sight, scale,
    q_docs: documents?.q_docs ?? 0, k_docs: documents?.k_docs ?? 0,
  };
  const workgroups = (rows: number, heads: number): [number] => {
    if (q.size === 0 || k.size === 0) return [0];
    if (tiled) return [batch * heads * Math.ceil(rows / TILE_ROWS)];
    return [Math.ceil((batch * heads * Math.ceil(rows / TEAM_ROWS) * slabs * lanes) / TEAM_WG)];
  };
  return {
    // Without the condition `seq_idx` the variable is bound but never read, so any tensor will do.
    seq_idx: documents?.numbers ?? q,
    tiled: tiled ? { params, constants, conditions } : null,
    byTeams: {
      params: { ...params, four: 4 }, constants: { ...constants, WG: TEAM_WG },
      conditions: ["subgroups" as const, ...octo ? ["octo" as const] : [], ...conditions],
    },
    forQueries: workgroups(seqlen, nheads),
    forKeys: workgroups(kv_seqlen, nkv_heads),
  };
}

export interface Attended {
  /** f32 [B, L, Hq, Dh] */
  readonly out: Tensor;
  /** f32 [B, Hq, L]: the logarithm of the sum of exp(scores); about -1e30 where nothing is seen. */
  readonly lse: Tensor;
}

/** @param q [B, L, Hq, Dh] with Dh a multiple of 4; k and v [B, Lk, Hkv, Dh] */
export function attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall): Attended {
  const { seq_idx, tiled, byTeams, forQueries: workgroups } = plan(q, k, call);
  const [batch, seqlen, nheads] = q.shape as [number, number, number];
  const out = q.device.empty(q.shape);
  const lse = q.device.empty([batch, nheads, seqlen]);
  const bind = { q, k, v, out, lse, seq_idx };
  if (tiled) launch("attention/attention_tile", { bind, ...tiled, workgroups });
  else launch("attention/attention", { bind, ...byTeams, workgroups });
  return { out, lse };
}

/** Adds to `all` what the same queries found among other keys: `all.out` in place; returns both. */
export function merge(all: Attended, more: Attended): Attended {
  const { out } = all;
  const [, seqlen, nheads, Dh] = out.shape as [number, number, number, number];
  const lse = out.device.empty(all.lse.shape);
  launch("attention/attention_merge", {
    bind: { out, more: more.out, lse_a: all.lse, lse_b: more.lse, lse },
    params: { seqlen, nheads, rows: lse.size }, constants: { WG, HEAD_VEC4: Dh / 4 },
    workgroups: [Math.ceil(out.size / 4 / WG)],
  });
  return { out, lse };
}

/** [B, Hq, L, 2]: the lse of every query and the product of its result with the result's gradient. */
export function statistics({ out, lse }: Attended, dout: Tensor): Tensor {
  const [, seqlen, nheads, Dh] = out.shape as [number, number, number, number];
  const total = lse.size;
  const stats = out.device.empty([total, 2]);
  launch("attention/attention_delta", {
    bind: { out, dout, lse, stats }, params: { seqlen, nheads, total },
    constants: { WG, HEAD_VEC4: Dh / 4 }, workgroups: [Math.ceil(total / WG)],
  });
  return stats;
}

/** Gradients of the queries, keys and values of one `attend`; `stats` may know of more keys than these. */
export function attendBackward(
  { q, k, v, dout, stats }: Readonly<Record<"q" | "k" | "v" | "dout" | "stats", Tensor>>,
  call: AttentionCall, wants: { q: boolean; kv: boolean },
): { dq: Tensor | null; dk: Tensor | null; dv: Tensor | null } {
  const { seq_idx, tiled, byTeams, forQueries, forKeys } = plan(q, k, call);
  const { device } = q;
  let dq: Tensor | null = null;
  let dk: Tensor | null = null;
  let dv: Tensor | null = null;
  if (wants.q) {
    dq = device.empty(q.shape);
    const bind = { q, k, v, dout, stats, dq, seq_idx };
    if (tiled) launch("attention/attention_tile_dq", { bind, ...tiled, workgroups: forQueries });
    else launch("attention/attention_dq", { bind, ...byTeams, workgroups: forQueries });
  }
  if (wants.kv) {
    // Keys without any query get zeros.
    dk = q.size === 0 ? device.zeros(k.shape) : device.empty(k.shape);
    dv = q.size === 0 ? device.zeros(v.shape) : device.empty(v.shape);
    const bind = { q, k, v, dout, stats, dk, dv, seq_idx };
    if (tiled) launch("attention/attention_tile_dkv", { bind, ...tiled, workgroups: forKeys });
    else launch("attention/attention_dkv", { bind, ...byTeams, workgroups: forKeys });
  }
  return { dq, dk, dv };
}

/** The last dimension widened to a multiple of four with zeros: a score gains nothing from them. */
export function widened(x: Tensor): Tensor {
  const Dh = x.shape.at(-1)!;
  return resized(x, 4 * Math.ceil(Dh / 4));
}

/** The last dimension cut, or widened with zeros. */
export function resized(x: Tensor, cols: number): Tensor {
  const Dh = x.shape.at(-1)!;
  if (Dh === cols) return x;
  const shape = [...x.shape.slice(0, -1), cols];
  const y = cols > Dh ? x.device.zeros(shape) : x.device.empty(shape);
  const rows = sizeOf(shape.slice(0, -1));
  copyColumns(rows, Math.min(Dh, cols), { tensor: x, cols: Dh, first: 0 }, { tensor: y, cols, first: 0 });
  return y;
}

/** Numbers of documents one list after the other in one tensor. */
export function listed(lists: readonly Tensor[]): Tensor {
  const [first] = lists;
  const all = first!.device.empty([lists.reduce((sum, { size }) => sum + size, 0)], "i32");
  let at = 0;
  for (const list of lists) {
    copyColumns(1, list.size, { tensor: list, cols: list.size, first: 0 },
      { tensor: all, cols: all.size, first: at });
    at += list.size;
  }
  return all;
}
