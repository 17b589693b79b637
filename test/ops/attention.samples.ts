import { attention } from "../../src/ops/attention.ts";
import * as ref from "../../src/reference/attention.ts";
import { type Draw, opSamples } from "./suite.ts";

interface Sizes {
  B?: number;
  L: number;
  Lk?: number;
  Hq: number;
  Hkv: number;
  Dh: number;
  deviation?: number;
  causal?: boolean;
}

const args = (sizes: Sizes, seq_idx?: number[]) => (r: Draw) => {
  const { B = 1, L, Lk = L, Hq, Hkv, Dh, deviation = 1, causal } = sizes;
  return [
    r.normal([B, L, Hq, Dh], deviation), r.normal([B, Lk, Hkv, Dh], deviation), r.normal([B, Lk, Hkv, Dh]),
    {
      scale: Dh ** -0.5, seq_idx: seq_idx ? r.of([B, L], seq_idx, "i32") : null,
      ...causal !== undefined && { causal },
    },
  ];
};
/** Queries in two stretches, at `starts` of the keys' positions. */
const stretches = (sizes: Sizes, starts: [number, number], seq?: [number[], number[]]) => (r: Draw) => {
  const [q, k, v, options] = args(sizes)(r);
  const { B = 1, L, Lk = L } = sizes;
  return [q, k, v, {
    ...options as object, starts,
    ...seq && { seq_idx: r.of([B, L], seq[0], "i32"), kv_seq_idx: r.of([B, Lk], seq[1], "i32") },
  }];
};
const documents = (...lengths: number[]) => lengths.flatMap((length, i) => Array<number>(length).fill(i));

export default opSamples({
  op: attention, reference: ref.attention, vjp: ref.attention_vjp,
  samples: [
    { name: "no batch", args: args({ B: 0, L: 4, Hq: 2, Hkv: 1, Dh: 8 }) },
    { name: "no queries", args: args({ L: 0, Hq: 2, Hkv: 1, Dh: 8 }) },
    { name: "no queries but keys", args: args({ L: 0, Lk: 3, Hq: 2, Hkv: 1, Dh: 8 }) },
    { name: "fewer tokens than a step", args: args({ B: 2, L: 3, Hq: 4, Hkv: 2, Dh: 12 }) },
    { name: "one workgroup of rows", args: args({ B: 2, L: 32, Hq: 2, Hkv: 2, Dh: 16 }) },
    { name: "one row more than a workgroup", args: args({ L: 33, Hq: 2, Hkv: 1, Dh: 16 }) },
    { name: "odd length, groups of three heads", args: args({ B: 3, L: 37, Hq: 6, Hkv: 2, Dh: 8 }) },
    { name: "two tokens", args: args({ L: 2, Hq: 4, Hkv: 2, Dh: 8 }) },
    { name: "heads of 20", args: args({ L: 41, Hq: 2, Hkv: 1, Dh: 20 }) },
    { name: "heads of 32", args: args({ L: 70, Hq: 4, Hkv: 2, Dh: 32 }), reduction: 140 },
    { name: "heads of 64", args: args({ L: 45, Hq: 2, Hkv: 1, Dh: 64 }) },
    { name: "heads of 128", args: args({ L: 40, Hq: 2, Hkv: 1, Dh: 128 }), reduction: 128 },
    { name: "heads of 128, a short row", args: args({ B: 2, L: 3, Hq: 2, Hkv: 1, Dh: 128 }), reduction: 128 },
    {
      name: "heads of 256, more keys than queries", reduction: 256,
      args: args({ L: 9, Lk: 34, Hq: 2, Hkv: 2, Dh: 256 }),
    },
    {
      name: "heads of 76 with documents",
      args: args({ B: 2, L: 35, Hq: 4, Hkv: 2, Dh: 76 }, documents(9, 26, 33, 2)),
    },
    { name: "heads of an odd width", args: args({ B: 2, L: 19, Hq: 2, Hkv: 1, Dh: 7 }) },
    { name: "more keys than queries", args: args({ B: 2, L: 5, Lk: 38, Hq: 4, Hkv: 2, Dh: 16 }) },
    { name: "one query, many keys", args: args({ L: 1, Lk: 67, Hq: 4, Hkv: 1, Dh: 16 }), reduction: 67 },
    { name: "large scores", args: args({ L: 33, Hq: 2, Hkv: 1, Dh: 16, deviation: 6 }), tolerance: 2e-5 },
    { name: "documents", args: args({ L: 48, Hq: 4, Hkv: 2, Dh: 8 }, documents(23, 7, 18)) },
    {
      name: "documents of two rows",
      args: args({ B: 2, L: 21, Hq: 2, Hkv: 1, Dh: 12 }, documents(5, 16, 20, 1)),
    },
    {
      name: "documents of one token",
      args: args({ L: 9, Hq: 2, Hkv: 1, Dh: 8 }, [0, 1, 1, 2, 3, 4, 4, 4, 5]),
    },
    {
      name: "all keys, odd length, groups of two heads",
      args: args({ B: 2, L: 37, Hq: 4, Hkv: 2, Dh: 8, causal: false }),
    },
    {
      name: "workgroup tile, more keys than queries",
      args: (r: Draw) => {
        const [q, k, v, options] = args({ B: 2, L: 35, Lk: 38, Hq: 2, Hkv: 1, Dh: 16 })(r);
        return [q, k, v, { ...options as object, kernel: "tile" }];
      },
    },
    { name: "all keys, heads of 64", args: args({ L: 35, Hq: 2, Hkv: 1, Dh: 64, causal: false }) },
    {
      name: "all keys, heads of 128", reduction: 128,
      args: args({ L: 35, Lk: 39, Hq: 2, Hkv: 1, Dh: 128, causal: false }),
    },
    { name: "all keys, more of them", args: args({ L: 5, Lk: 38, Hq: 2, Hkv: 2, Dh: 16, causal: false }) },
    { name: "all keys, fewer of them", args: args({ L: 35, Lk: 3, Hq: 2, Hkv: 1, Dh: 16, causal: false }) },
    {
      name: "all keys of the own document",
      args: args({ B: 2, L: 35, Hq: 4, Hkv: 2, Dh: 12, causal: false }, documents(9, 26, 33, 2)),
    },
    {
      name: "all keys of the own document, heads of 76",
      args: args({ B: 2, L: 35, Hq: 2, Hkv: 1, Dh: 76, causal: false }, documents(9, 26, 33, 2)),
    },
    {
      name: "two stretches of queries",
      args: stretches({ B: 2, L: 14, Lk: 56, Hq: 4, Hkv: 2, Dh: 8 }, [7, 42]),
    },
    {
      name: "two stretches that cross a workgroup's rows, the last keys unseen",
      args: stretches({ L: 38, Lk: 70, Hq: 2, Hkv: 1, Dh: 16 }, [0, 44]),
    },
    {
      name: "two stretches with documents", args: stretches(
        { B: 2, L: 6, Lk: 12, Hq: 2, Hkv: 1, Dh: 8 }, [3, 6],
        [documents(2, 4, 1, 5), [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]),
    },
    {
      name: "workgroup tile, two stretches with documents",
      args: (r: Draw) => {
        const [q, k, v, options] = stretches(
          { L: 6, Lk: 12, Hq: 2, Hkv: 1, Dh: 8 }, [3, 6],
          [documents(2, 4), [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]])(r);
        return [q, k, v, { ...options as object, kernel: "tile" }];
      },
    },
  ],
  errors: [
    {
      name: "stretches that overlap", args: stretches({ L: 4, Lk: 8, Hq: 1, Hkv: 1, Dh: 8 }, [3, 4]),
      message: /attention: starts must be ascending, 2 apart and within 8 positions, found \[3, 4\]/,
    },
    {
      name: "two stretches of an odd length", args: stretches({ L: 3, Lk: 8, Hq: 1, Hkv: 1, Dh: 8 }, [0, 4]),
      message: /attention: q must be an even number of causal queries with starts, found \[1, 3, 1, 8\]/,
    },
    {
      name: "documents of keys without those of queries",
      args: (r: Draw) => {
        const [q, k, v, options] = args({ L: 2, Hq: 1, Hkv: 1, Dh: 8 })(r);
        return [q, k, v, { ...options as object, kv_seq_idx: r.of([1, 2], [0, 0], "i32") }];
      },
      message: /attention: kv_seq_idx must be \[1, 2\] beside seq_idx, found \[1, 2\]/,
    },
    {
      name: "more queries than keys", args: args({ L: 5, Lk: 4, Hq: 2, Hkv: 1, Dh: 8 }),
      message: /attention: k must be \[1, Lk >= 5, Hkv, 8\], found \[1, 4, 1, 8\]/,
    },
    {
      name: "heads that do not group", args: args({ L: 4, Hq: 3, Hkv: 2, Dh: 8 }),
      message: /attention: the number of key heads must be a divisor of 3, found 2/,
    },
    {
      name: "heads too wide", args: args({ L: 2, Hq: 1, Hkv: 1, Dh: 260 }),
      message: /attention: .* at most 256, found/,
    },
    {
      name: "documents beside a longer history",
      args: args({ L: 4, Lk: 6, Hq: 1, Hkv: 1, Dh: 8 }, [0, 0, 1, 1]),
      message: /attention: seq_idx must be \[1, 6\] with Lk = L, found \[1, 4\]/,
    },
  ],
});
