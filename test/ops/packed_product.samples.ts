import { packed_product } from "../../src/ops/packed_product.ts";
import * as ref from "../../src/reference/packed_product.ts";
import { blocks, type Format } from "./quantize.samples.ts";
import { type Draw, opSamples, type Sample } from "./suite.ts";

interface Wanted {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly xFormat?: Format;
  readonly kernel?: string;
  readonly perRow?: boolean;
  /** Rows per expert instead of m. */
  readonly counts?: readonly number[];
}

function args(r: Draw, format: Format, wanted: Wanted): unknown[] {
  const { m, n, k, xFormat = format, kernel, perRow, counts } = wanted;
  const offsets = counts?.reduce<number[]>((ends, count) => [...ends, ends.at(-1)! + count], [0]);
  const options = perRow ? { perRow } : {};
  const [xCodes, xScales, xGlobal] = blocks(r, [offsets?.at(-1) ?? m, k], xFormat, options);
  const [codes, scales, global] = blocks(r, counts ? [counts.length, n, k] : [n, k], format, options);
  return [
    xCodes, xScales, codes, scales, offsets ? r.of([offsets.length], offsets, "u32") : null, {
      xFormat, format, ...(xGlobal ? { xGlobal } : {}), ...(global ? { global } : {}),
      ...(kernel ? { kernel } : {}),
    },
  ];
}

const of = (formats: readonly Format[], name: string, wanted: Wanted): Sample[] => formats.map((format) => ({
  name: `${format}, ${name}`, reduction: wanted.k, args: (r: Draw) => args(r, format, wanted),
}));

const ALL = ["nvfp4", "mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "fp8_e4m3", "fp8_e5m2", "fp8_blockwise"] as const;
const SOME = ["nvfp4", "mxfp8_e4m3", "fp8_e5m2", "fp8_blockwise"] as const;
const uneven = [5, 0, 17, 1, 0, 20];

export default opSamples({
  op: packed_product, reference: ref.packed_product,
  samples: [
    ...of(ALL, "odd rows and outputs", { m: 19, n: 21, k: 256 }),
    ...of(["nvfp4", "mxfp8_e4m3"], "one row", { m: 1, n: 5, k: 128 }),
    ...of(["nvfp4", "fp8_e4m3"], "half a block of 32", { m: 18, n: 18, k: 48 }),
    ...of(["fp8_e4m3"], "a scale per row", { m: 18, n: 19, k: 64, perRow: true }),
    ...of(["mxfp8_e4m3"], "x of E5M2",
      { m: 3, n: 18, k: 64, xFormat: "mxfp8_e5m2" }),
    ...of(["fp8_e5m2"], "x of E4M3", { m: 3, n: 18, k: 64, xFormat: "fp8_e4m3" }),
    ...of(SOME, "workgroup tile", { m: 67, n: 69, k: 128, kernel: "packed_tile" }),
    ...of(["nvfp4", "mxfp4"], "sums of whole numbers", { m: 67, n: 69, k: 64, kernel: "packed_dots" }),
    ...of(["mxfp8_e5m2"], "workgroup tile, x of E4M3",
      { m: 18, n: 5, k: 64, xFormat: "mxfp8_e4m3", kernel: "packed_tile" }),
    ...of(SOME, "experts without rows", { m: 0, n: 19, k: 128, counts: uneven }),
    ...of(["fp8_e4m3"], "experts, a scale per row", { m: 0, n: 18, k: 64, counts: [1, 0, 2], perRow: true }),
    ...of(["nvfp4"], "experts, workgroup tile",
      { m: 0, n: 70, k: 128, counts: [5, 0, 70, 1], kernel: "packed_tile" }),
    ...of(["nvfp4"], "no rows", { m: 0, n: 8, k: 32 }),
    ...of(["nvfp4", "fp8_e4m3"], "no inputs", { m: 3, n: 8, k: 0 }),
    ...of(["nvfp4"], "no rows of any expert", { m: 0, n: 8, k: 32, counts: [0, 0] }),
  ],
  errors: [
    {
      name: "formats of other blocks",
      message: /linear_packed: x must be nvfp4 beside a weight of nvfp4, found mxfp4/,
      args: (r) => args(r, "nvfp4", { m: 2, n: 3, k: 32, xFormat: "mxfp4" }),
    },
    {
      name: "a weight of whole numbers",
      message: /linear_packed: weight must be one of mxfp8_e4m3, .*, found q8/,
      args: (r) => args(r, "q8", { m: 2, n: 3, k: 32 }),
    },
    {
      name: "factors of two widths", message: /linear_packed: weight must be \[N, 64\], found \[3, 32\]/,
      args: (r) => [...args(r, "nvfp4", { m: 2, n: 1, k: 64 }).slice(0, 2),
        ...blocks(r, [3, 32], "nvfp4").slice(0, 2), null,
        { xFormat: "nvfp4", format: "nvfp4", xGlobal: r.of([1], [1]), global: r.of([1], [1]) }],
    },
    {
      name: "offsets for another number of experts",
      message: /grouped_linear_packed: offsets must be \[3\], found \[4\]/,
      args: (r) => args(r, "mxfp4", { m: 0, n: 3, k: 32, counts: [1, 1] }).map(
        (arg, i) => (i === 4 ? r.of([4], [0, 1, 2, 2], "u32") : arg)),
    },
  ],
});
