import { dequantize_blocks, embedding_blocks, quantize_blocks } from "../../src/ops/quantize.ts";
import * as ref from "../../src/reference/quantize.ts";
import { ndarray } from "../../src/tensor/ndarray.ts";
import { type Draw, type HostTensor, opSamples, type Sample } from "./suite.ts";

const FORMATS = ["q8", "q4"] as const;
const SCALED = [
  "mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4", "fp8_e4m3", "fp8_e5m2", "fp8_blockwise",
] as const;
export type Format = (typeof FORMATS)[number] | (typeof SCALED)[number];

/**
 * Ties, blocks of zeros, a largest value that occurs with both signs, scales below and above what f16 holds.
 */
const EDGES = [
  Array.from({ length: 32 }, (_, i) => (i - 16) * 0.5),
  Array.from({ length: 32 }, (_, i) => 127 - i * 0.5),
  Array.from({ length: 32 }, (_, i) => (i % 2 ? 1 : -1) * (127 - 8 * i + 0.5)),
  new Array<number>(32).fill(0),
  Array.from({ length: 32 }, (_, i) => (i === 3 ? -8 : i === 5 ? 8 : i * 0.25)),
  Array.from({ length: 32 }, (_, i) => (i - 9) * 1e-7),
  Array.from({ length: 32 }, (_, i) => (i - 9) * 1e-30),
  Array.from({ length: 32 }, (_, i) => (i - 20) * 1e7),
  Array.from({ length: 32 }, (_, i) => 2 ** -i),
].flat();

/** Codes and scales of drawn values, and global scales where the format has them. */
export function blocks(
  r: Draw, shape: number[], format: Format, options: { perRow?: boolean } = {},
): [codes: HostTensor, scales: HostTensor, global: HostTensor | null] {
  const { data } = r.normal(shape);
  const [codes, scales, global] = ref.quantize_blocks(ndarray(shape, data), format, options) as
    [HostTensor, HostTensor, HostTensor | undefined];
  const kind = format.startsWith("fp8") ? "f32" : format.startsWith("q") ? null : "u32";
  const stored = r.of(scales.shape, [...scales.data], kind ?? "f32");
  return [
    r.of(codes.shape, [...codes.data], "u32"), kind ? stored : r.half(stored, "f16"),
    global ? r.of(global.shape, [...global.data]) : null,
  ];
}

/** The same with the format between, as ops take them. */
export function asArguments(
  r: Draw, shape: number[], format: Format, options: { perRow?: boolean } = {},
): unknown[] {
  const [codes, scales, global] = blocks(r, shape, format, options);
  return [codes, scales, format, ...(global ? [global] : [])];
}

const each = (sample: (format: "q8" | "q4") => Sample[]): Sample[] =>
  FORMATS.flatMap((format) => sample(format).map(
    (s) => ({ ...s, name: `${format}, ${s.name}`, tolerance: 0 })));

/** Powers over the whole range of f32, subnormal numbers, ties and zeros. */
const WIDE = Array.from({ length: 128 * 8 }, (_, i) => {
  const power = [-140, -128, -90, -20, 0, 30, 88, 127][i >> 7]! + (i % 11) * 0.5;
  return i % 37 === 0 ? 0 : (i % 2 ? -1 : 1) * (1 + (i % 16) / 16) * 2 ** Math.min(Math.floor(power), 126);
});
const exactly = (sample: Sample): Sample => ({ ...sample, tolerance: 0 });

export default [
  opSamples({
    op: quantize_blocks, reference: ref.quantize_blocks,
    samples: [...SCALED.flatMap((format): Sample[] => [
      { name: `${format}, a matrix`, args: (r: Draw) => [r.normal([5, 384]), format] },
      { name: `${format}, a stack`, args: (r: Draw) => [r.normal([3, 7, 128], 0.02), format] },
      { name: `${format}, a wide range`, args: (r: Draw) => [r.of([8, 128], WIDE), format] },
      { name: `${format}, no rows`, args: (r: Draw) => [r.normal([0, 128]), format] },
      ...(format.startsWith("mx") ? [{
        name: `${format}, scales rounded up`,
        args: (r: Draw) => [r.normal([9, 96]), format, { scaleRule: "ceil" }],
      }] : []),
      ...(format === "fp8_e4m3" ? [{
        name: "fp8_e4m3, a scale per row", args: (r: Draw) => [r.normal([9, 48]), format, { perRow: true }],
      }] : []),
      ...(format === "nvfp4" ? [
        { name: "nvfp4, an odd number of blocks", args: (r: Draw) => [r.normal([3, 48]), format] },
        ...[{ tiles: true }, { reciprocals: true }, { tiles: true, reciprocals: true },
          { fourOverSix: "absolute" }, { fourOverSix: "squared" }].flatMap((options): Sample[] => [
          {
            name: `nvfp4, ${JSON.stringify(options)}`,
            args: (r: Draw) => [r.normal([2, 32, 48], 0.02), format, options],
          },
          // A tile or block of zeros, and one below what the tensor's scale can reach.
          {
            name: `nvfp4, ${JSON.stringify(options)}, uneven`,
            args: (r: Draw) => [r.of([16, 64], Array.from({ length: 1024 }, (_, i) =>
              Math.fround(Math.sin(i) * [0, 1e-9, 1, 300][(i >> 4) % 4]!))), format, options],
          },
        ]),
        { name: "nvfp4, zeros", args: (r: Draw) => [r.of([2, 16], new Array<number>(32).fill(-0)), format] },
      ] : []),
    ]).map(exactly), ...each((format) => [
      { name: "one block", args: (r) => [r.normal([32]), format] },
      { name: "an odd number of blocks", args: (r) => [r.normal([3, 96]), format] },
      { name: "a stack", args: (r) => [r.normal([2, 5, 64], 0.02), format] },
      { name: "many blocks", args: (r) => [r.normal([41, 160]), format] },
      { name: "edges", args: (r) => [r.of([EDGES.length / 32, 32], EDGES.map(Math.fround)), format] },
      { name: "no rows", args: (r) => [r.normal([0, 64]), format] },
    ])],
    errors: [
      {
        name: "rows that are not whole blocks", args: (r) => [r.normal([4, 48]), "q4"],
        message: /quantize.*values.*multiple of 32, the block of q4.*\[4, 48\]/,
      },
      {
        name: "a scale per row of blocks", args: (r) => [r.normal([4, 32]), "nvfp4", { perRow: true }],
        message: /quantize: perRow is for fp8_e4m3 and fp8_e5m2, found nvfp4/,
      },
      {
        name: "tiles of too few rows", args: (r) => [r.normal([24, 32]), "nvfp4", { tiles: true }],
        message: /quantize: values must be \[\.\.\., N, K\] with N a multiple of 16 .*, found \[24, 32\]/,
      },
      {
        name: "tiles of another format", args: (r) => [r.normal([16, 32]), "mxfp4", { tiles: true }],
        message: /quantize: tiles is for nvfp4, found mxfp4/,
      },
      {
        name: "four over six of tiles",
        args: (r) => [r.normal([16, 32]), "nvfp4", { tiles: true, fourOverSix: "squared" }],
        message: /quantize: fourOverSix does not go together with tiles/,
      },
      {
        name: "a scale rule for another format",
        args: (r) => [r.normal([4, 32]), "q8", { scaleRule: "ceil" }],
        message: /quantize: scaleRule is for the MX formats, found q8/,
      },
    ],
  }),
  opSamples({
    op: dequantize_blocks, reference: ref.dequantize_blocks,
    samples: [...SCALED.flatMap((format): Sample[] => [
      { name: `${format}, several rows`, args: (r: Draw) => asArguments(r, [37, 128], format) },
      { name: `${format}, a stack`, args: (r: Draw) => asArguments(r, [2, 3, 256], format) },
      ...(format === "fp8_e5m2" ? [{
        name: "fp8_e5m2, a scale per row",
        args: (r: Draw) => asArguments(r, [7, 48], format, { perRow: true }),
      }] : []),
      ...(format === "nvfp4" ? [{
        name: "nvfp4, a stack whose values are divided",
        args: (r: Draw) =>
          [...asArguments(r, [3, 5, 64], format).slice(0, 3), r.of([3], [1e3, 0.7, 41]), true],
      }] : []),
    ]).map(exactly), ...each((format) => [
      { name: "one block", args: (r) => asArguments(r, [32], format) },
      { name: "several rows", args: (r) => asArguments(r, [37, 96], format) },
      { name: "a stack", args: (r) => asArguments(r, [2, 3, 64], format) },
      { name: "no rows", args: (r) => asArguments(r, [0, 64], format) },
    ])],
    errors: [{
      name: "scales of another matrix", message: /dequantize.*scales.*\[3, 2\].*\[3, 3\]/,
      args: (r) => [blocks(r, [3, 64], "q8")[0], blocks(r, [3, 96], "q8")[1], "q8"],
    }],
  }),
  opSamples({
    op: embedding_blocks, reference: ref.embedding_blocks,
    samples: [...SCALED.map((format): Sample => exactly({
      name: `${format}, rows`,
      args: (r) => [r.integers([9], -1, 12), ...asArguments(r, [11, 128], format)],
    })), exactly({
      name: "nvfp4, rows that are divided",
      args: (r) => [
        r.integers([9], -1, 12), ...asArguments(r, [11, 64], "nvfp4").slice(0, 3), r.of([1], [1234.5]), true,
      ],
    }), ...each((format) => [
      { name: "rows", args: (r) => [r.integers([2, 9], 0, 11), ...asArguments(r, [11, 96], format)] },
      {
        name: "ids outside of the table",
        args: (r) => [r.of([4], [-1, 3, 5, 70], "i32"), ...asArguments(r, [5, 32], format)],
      },
      { name: "no ids", args: (r) => [r.integers([0], 0, 5), ...asArguments(r, [5, 32], format)] },
    ])],
    errors: [{
      name: "a stack", args: (r) => [r.integers([3], 0, 2), ...asArguments(r, [2, 3, 32], "q8")],
      message: /embedding.*weight.*\[V, D\]/,
    }],
  }),
];
