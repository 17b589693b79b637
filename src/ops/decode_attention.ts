import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import { UsageError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

const WG = 64;
const MERGE_WG = 32;
const TEAM_WG = 8; // two quads
const ONE_PART = 256; // positions of a cache that one launch goes through
const SHORTEST_PART = 64; // of a longer cache; a multiple of the 16 keys that a quad meets at a time
const MOST_PARTS = 32;

/** Values of a cache that share a word in FP8. */
const PER_WORD = 4;

/**
 * softmax(scale * q K^T) V of new tokens over a cache that holds them already.
 *
 * @param q         f32 [B, L, Hq, Dh], Dh at most 256; few tokens: every row of q walks over the whole cache
 * @param k_cache   f32 [B, Hkv, Lmax, Dh], v_cache the same; Hq a multiple of Hkv. Or u32
 *   [B, Hkv, Lmax, Dh / 4]: E4M3 codes, four to a word, with the scales
 * @param position  u32 [1]: index of the first new token; query t sees the positions up to position + t
 * @param k_scale   what the codes of k_cache are multiplied with; null for an f32 cache; v_scale likewise
 * @returns f32 [B, L, Hq, Dh]
 * @throws ShapeError for shapes that do not belong together
 */
export const decode_attention = defineOp({
  name: "decode_attention",
  forward(
    _ctx, q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, scale: number,
    k_scale: number | null = null, v_scale: number | null = null,
  ): Tensor {
    check(q.shape.length === 4, "decode_attention", "q", "[B, L, Hq, Dh]", q);
    const [B, L, Hq, Dh] = q.shape as [number, number, number, number];
    const [, Hkv = 0, capacity = 0] = k_cache.shape;
    check(Dh <= 256, "decode_attention", "the head width of q", "at most 256", q);
    const fp8 = k_cache.dtype === "u32";
    const width = fp8 ? Dh / PER_WORD : Dh;
    check(
      k_cache.shape.length === 4 && k_cache.shape[0] === B && k_cache.shape[3] === width,
      "decode_attention", "k_cache", `[${B}, Hkv, Lmax, ${width}]`, k_cache,
    );
    check(v_cache.dtype === k_cache.dtype, "decode_attention", "v_cache", k_cache.dtype, v_cache);
    checkScale("decode_attention", "k_scale", k_cache, k_scale);
    checkScale("decode_attention", "v_scale", v_cache, v_scale);
    check(
      v_cache.shape.join() === k_cache.shape.join(), "decode_attention", "v_cache",
      `[${k_cache.shape.join(", ")}]`, v_cache);
    check(
      Hkv > 0 && Hq % Hkv === 0, "decode_attention", "the number of key heads", `a divisor of ${Hq}`, Hkv);
    check(
      position.size === 1 && position.dtype === "u32", "decode_attention", "position", "u32 [1]", position);
    if (capacity === 0) return q.device.zeros(q.shape);
    const out = q.device.empty(q.shape);
    const { info, hasSubgroups } = q.device;
    const rows = B * L * Hq;
    const HEAD_VEC4 = Math.ceil(Dh / 4);
    // The parts follow from the capacity alone: a captured step serves every position.
    const needed = Math.max(SHORTEST_PART, 16 * Math.ceil(capacity / (16 * MOST_PARTS)));
    const length = capacity <= ONE_PART ? capacity : needed;
    const nparts = Math.ceil(capacity / length);
    const divided = nparts > 1;
    const sums = divided ? q.device.empty([rows, nparts, HEAD_VEC4 + 1, 4]) : out;
    const bind = { q, key: k_cache, value: v_cache, position, out: sums };
    const factors = { scale: scale * (k_scale ?? 1), v_scale: v_scale ?? 1 };
    const params = { seqlen: L, capacity, nheads: Hq, nkv_heads: Hkv, length, nparts, ...factors };
    const shared = [...(divided ? ["parts" as const] : []), ...(fp8 ? ["fp8" as const] : [])];
    if (info.isSoftware && hasSubgroups && Dh % 4 === 0) {
      const teams = B * Hkv * Math.ceil((L * Hq) / Hkv / 4) * Math.ceil(HEAD_VEC4 / 16) * nparts;
      launch("attention/decode_attention_team", {
        bind, params: { ...params, batch: B, four: 4 }, constants: { WG: TEAM_WG, HEAD_VEC4 },
        conditions: ["subgroups", ...shared], workgroups: [rows === 0 ? 0 : Math.ceil((4 * teams) / TEAM_WG)],
      });
    } else {
      // The lanes' results meet in workgroup memory: 1008 vectors. A processor wants few lanes and barriers.
      const lanes = Math.min(info.isSoftware ? 4 : 16, Math.floor(1008 / HEAD_VEC4));
      const conditions: ("vec4" | "wide" | "parts" | "fp8")[] = [...shared];
      if (Dh % 4 === 0) conditions.push("vec4");
      if (HEAD_VEC4 > 16) conditions.push("wide");
      launch("attention/decode_attention", {
        bind, params: { ...params, rows, head_dim: Dh }, constants: { WG: lanes, HEAD_VEC4 }, conditions,
        workgroups: [rows * nparts],
      });
    }
    if (divided) {
      launch("attention/decode_merge", {
        bind: { parts: sums, position, out },
        params: { rows, seqlen: L, capacity, nheads: Hq, head_dim: Dh, length, nparts },
        constants: { WG: MERGE_WG, HEAD_VEC4 }, conditions: Dh % 4 === 0 ? ["vec4"] : [],
        workgroups: [Math.ceil((rows * HEAD_VEC4) / MERGE_WG)],
      });
    }
    return out;
  },
});

/** @throws UsageError when a cache of codes has no positive scale, or another cache has one. */
function checkScale(op: string, name: string, cache: Tensor, scale: number | null): void {
  if (cache.dtype === "u32" ? scale !== null && scale > 0 && scale < Infinity : scale === null) return;
  const wanted = cache.dtype === "u32" ? "positive and finite for a cache of codes" : "null for an f32 cache";
  throw new UsageError(`${op}: ${name} must be ${wanted}, found ${scale}.`);
}

/**
 * cache[b, h, position + t] = x[b, t, h], in place; what would lie beyond the cache is dropped.
 *
 * @param cache     f32 [B, Hkv, Lmax, Dh], changed; or u32 [B, Hkv, Lmax, Dh / 4]: E4M3 codes of x / scale,
 *   the nearest, ties to even
 * @param x         f32 [B, L, Hkv, Dh]
 * @param position  u32 [1]
 * @param scale     for codes, positive; else null
 * @throws ShapeError for shapes that do not belong together
 */
export const cache_write = defineOp({
  name: "cache_write",
  mutates: [0],
  forward(_ctx, cache: Tensor, x: Tensor, position: Tensor, scale: number | null = null): Tensor[] {
    const [B, Hkv, capacity, width] = cache.shape as [number, number, number, number];
    const Dh = scale !== null ? width * PER_WORD : width;
    checkScale("cache_write", "scale", cache, scale);
    const fits = x.shape.length === 4 && x.shape[0] === B && x.shape[2] === Hkv && x.shape[3] === Dh;
    check(fits, "cache_write", "x", `[${B}, L, ${Hkv}, ${Dh}]`, x);
    check(position.size === 1 && position.dtype === "u32", "cache_write", "position", "u32 [1]", position);
    const count = scale !== null ? x.size / PER_WORD : x.size;
    const work = {
      params: { count, seqlen: x.shape[1]!, nkv_heads: Hkv, head_dim: width, capacity, scale: scale ?? 1 },
      constants: { WG }, workgroups: [Math.ceil(count / WG)] as [number],
    };
    if (scale !== null) {
      launch("attention/kv_cache",
        { entry: "write_codes", bind: { new_x: x, codes: cache, position }, ...work });
    } else {
      launch("attention/kv_cache", { entry: "write_tokens", bind: { new_x: x, cache, position }, ...work });
    }
    return [];
  },
});

/**
 * The first `length` positions of a cache in the layout that `attention` takes.
 *
 * @param cache  f32 [B, Hkv, Lmax, Dh], Lmax >= length; or u32 [B, Hkv, Lmax, Dh / 4] of E4M3 codes
 * @param scale  what codes are multiplied with; else null
 * @returns f32 [B, length, Hkv, Dh]
 */
export const cache_read = defineOp({
  name: "cache_read",
  forward(_ctx, cache: Tensor, length: number, scale: number | null = null): Tensor {
    check(cache.shape.length === 4, "cache_read", "cache", "[B, Hkv, Lmax, Dh]", cache);
    const [B, Hkv, capacity, width] = cache.shape as [number, number, number, number];
    check(
      Number.isInteger(length) && length >= 0 && length <= capacity, "cache_read", "length",
      `from 0 to ${capacity}`, length);
    checkScale("cache_read", "scale", cache, scale);
    const x = cache.device.empty([B, length, Hkv, scale !== null ? width * PER_WORD : width]);
    const count = scale !== null ? x.size / PER_WORD : x.size;
    const work = {
      params: { count, seqlen: length, nkv_heads: Hkv, head_dim: width, capacity, scale: scale ?? 1 },
      constants: { WG }, workgroups: [Math.ceil(count / WG)] as [number],
    };
    if (scale !== null) {
      launch("attention/kv_cache", { entry: "read_codes", bind: { old_codes: cache, tokens: x }, ...work });
    } else {
      launch("attention/kv_cache", { entry: "read_tokens", bind: { old_cache: cache, tokens: x }, ...work });
    }
    return x;
  },
});
