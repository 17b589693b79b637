import { ring_attention } from "../../src/ops/ring_attention.ts";
import * as ref from "../../src/reference/ring_attention.ts";
import { type Draw, opSamples } from "./suite.ts";

interface Sizes {
  ranks: number;
  B?: number;
  /** Positions of one rank. */
  L: number;
  Hq?: number;
  Hkv?: number;
  Dh?: number;
  deviation?: number;
}

/** @param seq numbers of documents, of every rank */
const args = (sizes: Sizes, seq: number[][] | null = null) => (r: Draw) => {
  const { ranks, B = 1, L, Hq = 2, Hkv = 1, Dh = 8, deviation = 1 } = sizes;
  const each = (heads: number, spread: number) =>
    Array.from({ length: ranks }, () => r.normal([B, L, heads, Dh], spread));
  return [
    {
      group: "cp", algorithm: "ring", ranks: Array.from({ length: ranks }, (_, i) => i), scale: Dh ** -0.5,
      seq_idx: seq && seq.map((numbers) => r.of([B, L], numbers, "i32")),
    },
    ...each(Hq, deviation), ...each(Hkv, deviation), ...each(Hkv, 1),
  ];
};

export default opSamples({
  op: ring_attention, reference: ref.ring_attention, vjp: ref.ring_attention_vjp,
  samples: [
    { name: "one rank", args: args({ ranks: 1, L: 6 }) },
    { name: "two ranks, one position to a stretch", args: args({ ranks: 2, L: 2, Hkv: 2 }) },
    { name: "two ranks, groups of heads", args: args({ ranks: 2, B: 2, L: 10, Hq: 4, Hkv: 2 }) },
    { name: "two ranks, more rows than a workgroup's", args: args({ ranks: 2, L: 38, Dh: 16 }) },
    { name: "three ranks, heads of an odd width", args: args({ ranks: 3, B: 2, L: 6, Dh: 7 }) },
    { name: "four ranks", args: args({ ranks: 4, L: 6, Dh: 12 }) },
    { name: "large scores", args: args({ ranks: 2, L: 16, Dh: 16, deviation: 6 }), tolerance: 2e-5 },
    // Of the row 0 0 0 1 1 1 1 2, two to a stretch: rank 0 has stretches 0 and 3, rank 1 has 1 and 2.
    {
      name: "documents of two rows", args: args(
        { ranks: 2, B: 2, L: 4 }, [[0, 0, 1, 2, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]]),
    },
    { name: "no rows", args: args({ ranks: 2, B: 0, L: 4 }) },
  ],
  errors: [
    {
      name: "stretches of unequal length", args: args({ ranks: 2, L: 3 }),
      message: /ring_attention: the positions of a rank must be two stretches of equal length, found 3/,
    },
    {
      name: "heads that do not group", args: args({ ranks: 2, L: 2, Hq: 3, Hkv: 2 }),
      message: /ring_attention: the number of key heads must be a divisor of 3, found 2/,
    },
    {
      name: "a tensor too few", args: (r) => args({ ranks: 2, L: 2 })(r).slice(0, -1),
      message: /ring_attention: the number of tensors must be 3 of each of 2 ranks, found 5/,
    },
    {
      name: "documents of another length",
      args: (r) => {
        const [options, ...rest] = args({ ranks: 2, L: 2 })(r);
        return [{ ...options as object, seq_idx: [r.of([1, 3], [0, 0, 0], "i32")] }, ...rest];
      },
      message: /ring_attention: seq_idx must be \[1, 2\], found \[1, 3\]/,
    },
  ],
});
