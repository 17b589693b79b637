import { grouped_linear } from "../../src/ops/grouped_linear.ts";
import * as ref from "../../src/reference/grouped_linear.ts";
import { rounded } from "./halves.ts";
import { type Draw, type HostTensor, opSamples, type Sample } from "./suite.ts";

/** Rows per expert, with the widths N and K. */
function grouped(name: string, counts: number[], [N, K]: [number, number], ...options: unknown[]): Sample {
  const offsets = counts.reduce<number[]>((ends, count) => [...ends, ends.at(-1)! + count], [0]);
  return {
    name, reduction: Math.max(N, K, ...counts),
    args: (r: Draw) => [
      r.normal([offsets.at(-1)!, K]), r.normal([counts.length, N, K]),
      r.of([offsets.length], offsets, "u32"), ...options,
    ],
  };
}

/** Rows of tokens, of which each goes to `topk` experts in some order. */
function permuted(name: string, counts: number[], widths: [number, number], topk: number, options =
  {}): Sample {
  const S = counts.reduce((a, b) => a + b, 0);
  const plain = grouped(name, counts, widths);
  return {
    ...plain,
    args: (r) => {
      const [, weight, offsets] = plain.args(r) as [unknown, unknown, unknown];
      const order = Array.from({ length: S }, (_, i) => i);
      for (let i = S - 1; i > 0; i--) {
        const j = Math.floor(r.next() * (i + 1));
        [order[i], order[j]] = [order[j]!, order[i]!];
      }
      const inverse = order.map((_, choice) => order.indexOf(choice));
      return [
        r.normal([S / topk, widths[1]]), weight, offsets,
        { ...options, permute: { slot_token: r.of([S], order, "u32"), token_slot: r.of([S], inverse, "u32"),
          topk } },
      ];
    },
  };
}

/** The same with rows after the last expert's; with `topk` as slots that no choice has. */
function spare(sample: Sample, [rows, width]: [number, number], topk = 0): Sample {
  return {
    ...sample, name: `${sample.name}, with spare rows`,
    args: (r) => {
      const [x, weight, offsets, options = {}] =
        sample.args(r) as [HostTensor, unknown, unknown, { permute?: { slot_token: HostTensor } }?];
      if (topk === 0) {
        const more = r.normal([rows, width]);
        const shape = [x.shape[0]! + rows, width];
        return [
          r.of(shape, [...x.data, ...more.data]), weight, offsets, { ...options, spare: true },
        ];
      }
      // Tokens more, of which no choice has a slot.
      const { slot_token } = options.permute!;
      const used = slot_token.data.length;
      const tokens = x.shape[0]! + rows;
      const order = [...slot_token.data];
      const choices = Array.from({ length: tokens * topk }, (_, choice) => choice);
      const others = choices.filter((choice) => !order.includes(choice));
      const inverse = choices.map((choice) => [...order, ...others].indexOf(choice));
      return [
        r.normal([tokens, width]), weight, offsets,
        { ...options, spare: true, permute: {
          slot_token: r.of([used + 3], [...order, ...others.slice(0, 3)], "u32"),
          token_slot: r.of([choices.length], inverse, "u32"), topk,
        } },
      ];
    },
  };
}

/** The same with some arguments stored in a half. */
function halves(sample: Sample, positions: number[], dtype: "f16" | "bf16"): Sample {
  return {
    ...sample,
    args: (r) => sample.args(r).map(
      (arg, i) => positions.includes(i) ? r.half(arg as HostTensor, dtype) : arg),
  };
}

const uneven = [5, 0, 17, 1, 0, 40];

export default opSamples({
  op: grouped_linear, reference: ref.grouped_linear, vjp: ref.grouped_linear_vjp,
  samples: [
    grouped("whole vectors, experts without rows", uneven, [20, 16]),
    grouped("odd widths", uneven, [19, 13]),
    grouped("odd outputs", uneven, [18, 12]),
    grouped("odd inputs", uneven, [24, 11]),
    grouped("whole tiles", [16, 32, 16], [32, 16]),
    grouped("all rows with the last expert", [0, 0, 0, 37], [8, 12]),
    grouped("one expert", [33], [12, 8]),
    grouped("one row each", Array.from({ length: 12 }, () => 1), [16, 24]),
    grouped("few rows", [1, 0, 2, 0, 3], [18, 20]),
    grouped("few rows, odd", [1, 0, 2, 0, 3], [9, 7]),
    grouped("matvec", [1, 0, 2, 0, 3], [18, 20], { kernel: "matvec" }),
    grouped("workgroup tile", [5, 0, 70, 1], [70, 12], { kernel: "tile" }),
    grouped("workgroup tile, odd", [5, 0, 70, 1], [9, 19], { kernel: "tile" }),
    grouped("matrix units", [5, 0, 70, 1], [9, 19], { kernel: "matrix" }),
    ...(["f16", "bf16"] as const).flatMap((dtype) => [
      halves(grouped(`weights in ${dtype}`, uneven, [20, 16]), [1], dtype),
      halves(grouped(`odd weights in ${dtype}`, uneven, [19, 13]), [1], dtype),
      halves(grouped(`few rows, weights in ${dtype}`, [1, 0, 2], [18, 20]), [1], dtype),
      halves({ ...grouped(`all in ${dtype}`, uneven, [20, 16]), ...rounded(dtype) }, [0, 1], dtype),
    ]),
    grouped("relu2", uneven, [20, 16], { activation: "relu2" }),
    grouped("relu2, few rows", [1, 0, 2], [18, 20], { activation: "relu2" }),
    permuted("in the order of tokens", [5, 0, 17, 2], [20, 16], 3),
    permuted("in the order of tokens, odd widths", [5, 0, 17, 2], [19, 13], 2),
    permuted("in the order of tokens, relu2", [5, 0, 17, 2], [20, 16], 4, { activation: "relu2" }),
    permuted("in the order of tokens, few rows", [1, 0, 2, 1], [18, 20], 2, { activation: "relu2" }),
    permuted("in the order of tokens, workgroup tile", [5, 0, 70, 1], [70, 12], 2, { kernel: "tile" }),
    grouped("no rows", [0, 0, 0], [8, 12]),
    spare(grouped("plain", uneven, [20, 16]), [9, 16]),
    spare(grouped("relu2", uneven, [19, 13], { activation: "relu2" }), [40, 13]),
    spare(grouped("few rows", [1, 0, 2], [18, 20]), [4, 20]),
    spare(grouped("workgroup tile", [5, 0, 70, 1], [9, 19], { kernel: "tile" }), [70, 19]),
    spare(permuted("in the order of tokens", [5, 0, 17, 2], [20, 16], 3), [7, 16], 3),
    spare(permuted("in the order of tokens, relu2", [5, 0, 17, 2], [19, 13], 2, { activation: "relu2" }),
      [7, 13], 2),
    spare(permuted("in the order of tokens, few rows", [1, 0, 1], [18, 20], 2), [2, 20], 2),
  ],
  errors: [
    {
      name: "weight of the wrong width", message: /grouped_linear.*weight.*\[E, N, 4\].*\[2, 3, 5\]/,
      args: (r) => [r.normal([2, 4]), r.normal([2, 3, 5]), r.of([3], [0, 1, 2], "u32")],
    },
    {
      name: "offsets for another number of experts", message: /grouped_linear.*offsets.*\[3\].*\[4\]/,
      args: (r) => [r.normal([2, 4]), r.normal([2, 3, 4]), r.of([4], [0, 1, 2, 2], "u32")],
    },
  ],
});
