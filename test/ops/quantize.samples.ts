import { dequantize_blocks, embedding_blocks, quantize_blocks } from "../../src/ops/quantize.ts";
import * as ref from "../../src/reference/quantize.ts";
import { ndarray } from "../../src/tensor/ndarray.ts";
import { type Draw, type HostTensor, opSamples, type Sample } from "./suite.ts";

const FORMATS = ["q8", "q4"] as const;

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

/** Codes and scales of drawn values. */
export function blocks(r: Draw, shape: number[], format: "q8" | "q4"): [HostTensor, HostTensor] {
  const { data } = r.normal(shape);
  const [codes, scales] = ref.quantize_blocks(ndarray(shape, data), format) as [HostTensor, HostTensor];
  return [
    r.of(codes.shape, [...codes.data], "u32"), r.half(r.of(scales.shape, [...scales.data]), "f16"),
  ];
}

const each = (sample: (format: "q8" | "q4") => Sample[]): Sample[] =>
  FORMATS.flatMap((format) => sample(format).map(
    (s) => ({ ...s, name: `${format}, ${s.name}`, tolerance: 0 })));

export default [
  opSamples({
    op: quantize_blocks, reference: ref.quantize_blocks,
    samples: each((format) => [
      { name: "one block", args: (r) => [r.normal([32]), format] },
      { name: "an odd number of blocks", args: (r) => [r.normal([3, 96]), format] },
      { name: "a stack", args: (r) => [r.normal([2, 5, 64], 0.02), format] },
      { name: "many blocks", args: (r) => [r.normal([41, 160]), format] },
      { name: "edges", args: (r) => [r.of([EDGES.length / 32, 32], EDGES.map(Math.fround)), format] },
      { name: "no rows", args: (r) => [r.normal([0, 64]), format] },
    ]),
    errors: [{
      name: "rows that are not whole blocks", args: (r) => [r.normal([4, 48]), "q4"],
      message: /quantize.*values.*multiple of 32, the block of q4.*\[4, 48\]/,
    }],
  }),
  opSamples({
    op: dequantize_blocks, reference: ref.dequantize_blocks,
    samples: each((format) => [
      { name: "one block", args: (r) => [...blocks(r, [32], format), format] },
      { name: "several rows", args: (r) => [...blocks(r, [37, 96], format), format] },
      { name: "a stack", args: (r) => [...blocks(r, [2, 3, 64], format), format] },
      { name: "no rows", args: (r) => [...blocks(r, [0, 64], format), format] },
    ]),
    errors: [{
      name: "scales of another matrix", message: /dequantize.*scales.*\[3, 2\].*\[3, 3\]/,
      args: (r) => [blocks(r, [3, 64], "q8")[0], blocks(r, [3, 96], "q8")[1], "q8"],
    }],
  }),
  opSamples({
    op: embedding_blocks, reference: ref.embedding_blocks,
    samples: each((format) => [
      { name: "rows", args: (r) => [r.integers([2, 9], 0, 11), ...blocks(r, [11, 96], format), format] },
      {
        name: "ids outside of the table",
        args: (r) => [r.of([4], [-1, 3, 5, 70], "i32"), ...blocks(r, [5, 32], format), format],
      },
      { name: "no ids", args: (r) => [r.integers([0], 0, 5), ...blocks(r, [5, 32], format), format] },
    ]),
    errors: [{
      name: "a stack", args: (r) => [r.integers([3], 0, 2), ...blocks(r, [2, 3, 32], "q8"), "q8"],
      message: /embedding.*weight.*\[V, D\]/,
    }],
  }),
];
