import { grouped_linear_blocks, linear_blocks } from "../../src/ops/block_linear.ts";
import * as ref from "../../src/reference/block_linear.ts";
import { blocks, type Format } from "./quantize.samples.ts";
import { type Draw, opSamples, type Sample } from "./suite.ts";

const FORMATS = ["q8", "q4"] as const;
/** One for every element and every kind of scale. */
const SCALED = ["mxfp8_e5m2", "mxfp4", "nvfp4", "fp8_e4m3", "fp8_blockwise"] as const;

/** x of the given shape times a quantised [N, K]. */
function linear(
  name: string, shape: number[], N: number, bias: boolean, kernel?: string, end?: "relu2" | "residual",
  formats: readonly Format[] = FORMATS, options: { perRow?: boolean } = {},
): Sample[] {
  const K = shape.at(-1)!;
  return formats.map((format) => ({
    name: `${format}, ${name}`, reduction: Math.max(K, N),
    args: (r: Draw) => {
      const x = r.normal(shape);
      const [codes, scales, global] = blocks(r, [N, K], format, options);
      return [
        x, codes, scales, bias ? r.normal([N]) : null,
        end === "residual" ? r.normal([...shape.slice(0, -1), N]) : null, {
          format, ...(global ? { global } : {}), ...(kernel ? { kernel } : {}),
          ...(end === "relu2" ? { activation: "relu2" } : {}),
        },
      ];
    },
  }));
}

/** Rows per expert, with the widths N and K. */
function grouped(
  name: string, counts: number[], [N, K]: [number, number], kernel?: string,
  formats: readonly Format[] = FORMATS, options: { perRow?: boolean } = {},
): Sample[] {
  const offsets = counts.reduce<number[]>((ends, count) => [...ends, ends.at(-1)! + count], [0]);
  return formats.map((format) => ({
    name: `${format}, ${name}`, reduction: Math.max(N, K),
    args: (r: Draw) => {
      const x = r.normal([offsets.at(-1)!, K]);
      const [codes, scales, global] = blocks(r, [counts.length, N, K], format, options);
      return [
        x, codes, scales, r.of([offsets.length], offsets, "u32"),
        { format, ...(global ? { global } : {}), ...(kernel ? { kernel } : {}) },
      ];
    },
  }));
}

const uneven = [5, 0, 17, 1, 0, 40];

export default [
  opSamples({
    op: linear_blocks, reference: ref.linear_blocks, vjp: ref.linear_blocks_vjp,
    samples: [
      ...linear("one row", [1, 96], 40, true),
      ...linear("one row, odd outputs", [1, 1, 32], 19, false),
      ...linear("one row, many outputs", [1, 64], 517, true),
      ...linear("two rows", [2, 96], 37, true),
      ...linear("a vector", [64], 5, false),
      ...linear("many rows", [2, 19, 96], 36, true),
      ...linear("many rows, odd outputs", [33, 64], 35, true),
      ...linear("five rows", [5, 160], 16, false),
      ...linear("matvec", [3, 1120], 37, true, "block_matvec"),
      ...linear("workgroup tile", [67, 96], 69, true, "block_tile"),
      ...(["relu2", "residual"] as const).flatMap((end) => [
        ...linear(`one row, ${end}`, [1, 64], 37, true, undefined, end),
        ...linear(`one row, many outputs, ${end}`, [1, 32], 517, false, undefined, end),
        ...linear(`many rows, ${end}`, [19, 64], 35, true, undefined, end),
        ...linear(`matvec, ${end}`, [2, 64], 37, true, "block_matvec", end),
        ...linear(`workgroup tile, ${end}`, [18, 32], 21, true, "block_tile", end),
      ]),
      ...linear("one row", [1, 256], 37, true, undefined, undefined, SCALED),
      ...linear("many rows", [19, 128], 21, true, undefined, undefined, SCALED),
      ...linear("matvec", [2, 128], 37, false, "block_matvec", "residual", SCALED),
      ...linear("workgroup tile", [18, 128], 21, true, "block_tile", undefined, SCALED),
      ...linear("one row, half a block of 32", [1, 48], 18, true, undefined, "relu2", ["nvfp4", "fp8_e5m2"]),
      ...linear("many rows, half a block of 32", [18, 48], 18, true, undefined, "relu2", ["nvfp4"]),
      ...linear("a scale per row", [2, 64], 18, true, undefined, undefined, ["fp8_e4m3"], { perRow: true }),
      ...linear("many rows, a scale per row", [18, 64], 18, false, undefined, undefined, ["fp8_e5m2"],
        { perRow: true }),
      ...linear("workgroup tile, a scale per row", [18, 64], 18, false, "block_tile", undefined, ["fp8_e4m3"],
        { perRow: true }),
      ...linear("no rows", [0, 64], 8, true),
      ...linear("no inputs", [5, 0], 8, true),
    ],
    errors: [
      {
        name: "weight of the wrong width", message: /linear.*weight.*\[N, 64\].*\[8, 32\]/,
        args: (r) => [
          r.normal([2, 64]), ...blocks(r, [8, 32], "q8").slice(0, 2), null, null, { format: "q8" },
        ],
      },
      {
        name: "bias of the wrong width", message: /linear.*bias.*\[8\].*\[4\]/,
        args: (r) => [r.normal([2, 32]), ...blocks(r, [8, 32], "q4").slice(0, 2), r.normal([4]), null,
          { format: "q4" }],
      },
      {
        name: "a residual beside an activation", message: /linear.*residual.*null beside an activation/,
        args: (r) => [
          r.normal([2, 32]), ...blocks(r, [8, 32], "q4").slice(0, 2), null, r.normal([2, 8]),
            { format: "q4", activation: "relu2" },
        ],
      },
    ],
  }),
  opSamples({
    op: grouped_linear_blocks, reference: ref.grouped_linear_blocks, vjp: ref.grouped_linear_blocks_vjp,
    samples: [
      ...grouped("experts without rows", uneven, [20, 64]),
      ...grouped("odd outputs", uneven, [19, 32]),
      ...grouped("one row each", Array.from({ length: 8 }, () => 1), [16, 96]),
      ...grouped("few rows", [1, 0, 2, 0, 3], [18, 32]),
      ...grouped("matvec", [1, 0, 2, 0, 3], [18, 64], "block_matvec"),
      ...grouped("workgroup tile", [5, 0, 70, 1], [70, 32], "block_tile"),
      ...grouped("experts without rows", uneven, [19, 128], undefined, SCALED),
      ...grouped("few rows", [1, 0, 2, 0, 3], [18, 128], undefined, SCALED),
      ...grouped("matvec", [1, 0, 2], [18, 64], "block_matvec", ["nvfp4", "mxfp8_e5m2"]),
      ...grouped("workgroup tile", [5, 0, 70, 1], [70, 32], "block_tile", ["nvfp4", "fp8_e4m3"]),
      ...grouped("a scale per row", [1, 0, 2], [18, 64], undefined, ["fp8_e4m3"], { perRow: true }),
      ...grouped("no rows", [0, 0, 0], [8, 32]),
    ],
    errors: [
      {
        name: "offsets for another number of experts", message: /grouped_linear.*offsets.*\[3\].*\[4\]/,
        args: (r) => [
          r.normal([2, 32]), ...blocks(r, [2, 3, 32], "q8").slice(0, 2), r.of([4], [0, 1, 2, 2], "u32"),
          { format: "q8" },
        ],
      },
    ],
  }),
];
