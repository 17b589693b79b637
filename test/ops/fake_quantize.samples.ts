import { fake_quantize, padded_offsets, update_scales } from "../../src/ops/fake_quantize.ts";
import * as ref from "../../src/reference/fake_quantize.ts";
import { type NdArray, ndarray } from "../../src/tensor/ndarray.ts";
import { type Draw, opSamples, type Sample } from "./suite.ts";

const FORMATS = [
  "bf16", "fp8_e4m3", "fp8_e5m2", "fp8_blockwise", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4",
] as const;

/** Same codes, same scales: nothing may differ. */
const exact = (name: string, args: (r: Draw) => unknown[]): Sample => ({ name, args, tolerance: 0 });

/** Values of very different sizes, with zeros, ties of E2M1 and E4M3, and whole lines of zeros. */
function rough(r: Draw, shape: number[]) {
  const { data } = r.normal(shape);
  const cols = shape.at(-1)!;
  const edges = [0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -5, 17, 18, 464, 2 ** -10, 3 * 2 ** -10];
  return r.of(shape, [...data].map((value, i) => {
    if (Math.floor(i / cols) % 7 === 5) return 0;
    return i % 5 === 0 ? edges[(i / 5) % 16]! : value * 10 ** ((i % 11) - 6);
  }).map(Math.fround));
}

const counter = (r: Draw) => r.of([4], [0x89abcdef, 0x12, 7, 0], "u32");

/** Groups of these sizes, each row going to topk of them in some order. */
function permuted(r: Draw, counts: number[], topk: number) {
  const offsets = counts.reduce<number[]>((ends, count) => [...ends, ends.at(-1)! + count], [0]);
  const rows = offsets.at(-1)!;
  const order = Array.from({ length: rows }, (_, i) => (i * 7) % rows);
  return {
    rows: rows / topk, offsets: r.of([offsets.length], offsets, "u32"),
    permute: { slot_token: r.of([rows], order, "u32"), topk },
  };
}

export default [
  opSamples({
    op: fake_quantize, reference: ref.fake_quantize,
    samples: [
      ...FORMATS.flatMap((format) => [
        exact(`${format}, rows`, (r) => [rough(r, [5, 256]), { format }]),
        exact(`${format}, lines that end within a block, of odd width`, (r) => [
          rough(r, [9, 67]), { format }]),
        ...(format.startsWith("fp8_e") || format === "bf16" ? [] : [
          exact(`${format}, columns`, (r) => [rough(r, [150, 12]), { format, blocks: "columns" }]),
        ]),
      ]),
      exact("nvfp4, tiles", (r) => [rough(r, [48, 40]), { format: "nvfp4", blocks: "tiles" }]),
      exact("fp8_blockwise, tiles", (r) => [
        rough(r, [130, 140]), { format: "fp8_blockwise", blocks: "tiles" }]),
      exact("fp8_blockwise, scales that are no powers of two",
        (r) => [rough(r, [3, 200]), { format: "fp8_blockwise", whole_scale: true }]),
      exact("fp8_blockwise, such scales in tiles",
        (r) => [rough(r, [130, 12]), { format: "fp8_blockwise", whole_scale: true, blocks: "tiles" }]),
      exact("mxfp8_e4m3, scales of OCP", (r) => [
        rough(r, [4, 64]), { format: "mxfp8_e4m3", scale_rule: "floor" }]),
      exact("fp8_e4m3, given scale", (r) => [rough(r, [4, 64]),
        { format: "fp8_e4m3", given: { scales: r.of([3], [1, 0.0625, 7], "f32"), slot: 1 } }]),
      exact("nvfp4, stochastic rows", (r) => [r.normal([6, 40]),
        { format: "nvfp4", random: { counter: counter(r), stream: 3 } }]),
      exact("nvfp4, stochastic columns", (r) => [r.normal([37, 10]),
        { format: "nvfp4", blocks: "columns", random: { counter: counter(r), stream: 4 } }]),
      exact("nvfp4, stochastic rows of a part of a matrix", (r) => [r.normal([3, 32]), {
        format: "nvfp4", random: { counter: counter(r), stream: 3, apart: 2, place: {
          table: r.of([5], [4, 9, 2, 7, 1], "u32"), lines: 3, whole: 8 } },
      }]),
      exact("nvfp4, stochastic columns of a part of a matrix", (r) => [r.normal([48, 20]), {
        format: "nvfp4", blocks: "columns", random: { counter: counter(r), stream: 4, apart: 5, place: {
          table: r.of([5], [0, 3, 5, 6, 2], "u32"), lines: 3, whole: 6 } },
      }]),
      exact("nvfp4, rotated columns", (r) => [
        r.of([40, 12], [...r.integers([40, 12], -9, 9).data]),
        { format: "nvfp4", blocks: "columns", hadamard: true }]),
      exact("nvfp4, rotated, stochastic", (r) => [r.normal([64, 7]), { format: "nvfp4", blocks: "columns",
        hadamard: true, random: { counter: counter(r), stream: 1 } }]),
      exact("bf16, the rotation alone", (r) => [r.normal([2, 20, 9]), { format: "bf16", blocks: "columns",
        hadamard: true }]),
      exact("mxfp8_e4m3, groups", (r) => [rough(r, [83, 8]), { format: "mxfp8_e4m3", blocks: "columns",
        groups: { offsets: r.of([5], [0, 40, 40, 41, 83], "u32") } }]),
      exact("nvfp4, rotated groups of permuted rows", (r) => {
        const { rows, offsets, permute } = permuted(r, [19, 0, 16, 7, 6], 3);
        return [r.normal([rows, 20]), { format: "nvfp4", blocks: "columns", hadamard: true,
          groups: { offsets, permute } }];
      }),
      exact("mxfp8_e4m3, groups of permuted rows", (r) => {
        const { rows, offsets, permute } = permuted(r, [1, 33, 14], 2);
        return [r.normal([rows, 6]), { format: "mxfp8_e4m3", blocks: "columns",
          groups: { offsets, permute } }];
      }),
      exact("a large tensor", (r) => [r.normal([700, 96]), { format: "nvfp4" }]),
      exact("no rows", (r) => [r.normal([0, 16]), { format: "nvfp4" }]),
      exact("zeros", (r) => [r.of([2, 16], new Array<number>(32).fill(0)), { format: "nvfp4" }]),
    ],
    errors: [
      { name: "random rounding of FP8", message: /fake_quantize.*random.*nvfp4.*found fp8_e4m3/,
        args: (r) => [r.normal([2, 8]), { format: "fp8_e4m3", random: { counter: counter(r), stream: 0 } }] },
      { name: "a rotation of rows", message: /fake_quantize.*Hadamard.*columns.*found nvfp4 in rows/,
        args: (r) => [r.normal([2, 8]), { format: "nvfp4", hadamard: true }] },
    ],
  }),
  opSamples({
    op: padded_offsets, reference: ref.padded_offsets,
    samples: [
      { name: "groups", args: (r) => [r.of([6], [0, 1, 17, 17, 33, 40], "u32"), 16], tolerance: 0 },
      { name: "one group", args: (r) => [r.of([2], [0, 32], "u32"), 32], tolerance: 0 },
    ],
  }),
  opSamples({
    op: update_scales,
    reference: (magnitudes: NdArray, history: NdArray, scales: NdArray, tops: NdArray, counter: NdArray) => {
      const [m, h, s] = [magnitudes, history, scales].map(({ shape, data }) => ndarray(shape, data.slice()));
      ref.update_scales(m!, h!, s!, tops, counter);
      return [m, h, s];
    },
    samples: [3, 1, 100].map((length) => exact(`a history of ${length}`, (r) => {
      const magnitudes = r.integers([6, 4], 0x3d000000, 0x41000000, "u32").data;
      magnitudes[4] = 0x7f800000; // infinity does not enter
      magnitudes.fill(0, 8, 12);
      const history = [...r.uniform([6 * length], 0, 2).data].map(
        (x, i) => (i < 3 * length ? 0 : Math.fround(x)));
      return [
        r.of([6, 4], [...magnitudes], "u32"), r.of([6, length], history), r.of([6], [1, 2, 3, 4, 5, 6]),
        r.of([6], [448, 448, 57344, 448, 57344, 448]), r.of([4], [1, 2, 3, 7], "u32"),
      ];
    })),
    errors: [{
      name: "tops of another number", message: /update_scales.*tops.*\[2\].*\[3\]/,
      args: (r) => [r.integers([2, 4], 0, 9, "u32"), r.uniform([2, 5]), r.uniform([2]), r.uniform([3]),
        r.integers([4], 0, 9, "u32")],
    }],
  }),
];
