import { open, rename, rm } from "node:fs/promises";
import { openFile } from "../../io/files.node.ts";
import {
  openSafetensors, safetensorsPieces, type TensorEntry, type TensorInfo, type TensorReader,
} from "../../io/safetensors.ts";
import { FormatError, UsageError } from "../../tensor/errors.ts";
import {
  blockOf, dequantizeScaled, ELEMENTS, type ElementFormat, quantizeScaled, type Scaled, SCALED_FORMATS,
  SCALED_LAYOUTS, type ScaledFormat, type ScaledOptions, scaleShapeOf,
} from "../../tensor/formats.ts";
import { closest, defineCommand } from "../args.ts";

const ELEMENT_FORMATS =
  ["e4m3fn", "e5m2", "e2m1", "bf16", "f16"] as const satisfies readonly ElementFormat[];
const FORMATS: readonly string[] = [...ELEMENT_FORMATS, ...SCALED_FORMATS];

export const numerics = defineCommand({
  name: "numerics",
  summary: "Write every f32 tensor of a file in low-precision formats, for comparison with other tables.",
  description:
    "For every F32 tensor NAME and every format the output holds NAME.FORMAT.codes: U8, or U16 for bf16 " +
    "and f16, one code per element, rounded to nearest even and saturated. Formats with scales add .scales " +
    "(U8 codes, or F32 for the fp8 formats), .dequant (F32, the values that codes and scales stand for) " +
    "and for NVFP4 .global_scale (F32). Blocks lie along the last dimension. Computed on the processor, " +
    "bit for bit like the kernels: `krait bench numerics` compares the two. Tensors of other dtypes are " +
    "left out.",
  options: {
    input: { type: "string", value: "FILE", required: true, help: "A safetensors file." },
    out: { type: "string", value: "FILE", required: true, help: "The safetensors file to write." },
    formats: {
      type: "string", value: "LIST", required: true, help: `Separated by commas: ${FORMATS.join(", ")}.`,
    },
    scaleRule: {
      type: "string", choices: ["floor", "ceil"], default: "floor",
      help: "MX formats: a scale's exponent is floor(log2 amax) - emax, or the least without saturation.",
    },
    reciprocals: {
      type: "boolean",
      help: "NVFP4: products with reciprocals, as Transformer Engine rounds, instead of quotients.",
    },
    json: { type: "boolean", help: "Print a JSON summary instead of a line." },
  },
  examples: ["krait numerics --input x.safetensors --out codes.safetensors --formats e4m3fn,mxfp4,nvfp4"],
  async run({ options, stdout }) {
    const formats = parseFormats(options.formats);
    const source = await openFile(options.input);
    if (!source) throw new UsageError(`The input file ${options.input} does not exist.`);
    const reader = await openSafetensors(source);
    try {
      const all = [...reader.tensors.values()];
      const tensors = all.filter(({ dtype }) => dtype === "F32");
      const skipped = all.filter(({ dtype }) => dtype !== "F32")
        .map(({ name, dtype }) => ({ name, dtype }));
      if (tensors.length === 0) {
        const found = skipped.map(({ name, dtype }) => `${name} (${dtype})`).join(", ") || "no tensor";
        throw new FormatError(`${options.input}: expected a tensor of dtype F32, found ${found}.`);
      }
      // What cannot be done is found before anything is written.
      if (options.reciprocals && !formats.some((format) => format.startsWith("nvfp4"))) {
        throw new UsageError(`--reciprocals is for nvfp4 and nvfp4_16x16, found ${formats.join(", ")}.`);
      }
      for (const tensor of tensors) await check(reader, tensor, formats, options);
      const entries = tensors.flatMap((tensor) => formats.flatMap((format) =>
        isElement(format) ? [elementEntry(reader, tensor, format)]
          : scaledEntries(reader, tensor, format, optionsOf(format, options))));
      await writeFile(options.out, entries);
      const summary = {
        out: options.out, tensors: tensors.length, formats, written: entries.length, skipped,
      };
      const left = skipped.length === 0 ? ""
        : `; left out: ${skipped.map(({ name, dtype }) => `${name} (${dtype})`).join(", ")}`;
      stdout.write(options.json ? `${JSON.stringify(summary)}\n`
        : `${entries.length} tensors written to ${options.out}, from ${tensors.length} of F32${left}\n`);
    } finally {
      await reader.close();
    }
  },
});

type Format = (typeof ELEMENT_FORMATS)[number] | ScaledFormat;

function isElement(format: Format): format is (typeof ELEMENT_FORMATS)[number] {
  return (ELEMENT_FORMATS as readonly string[]).includes(format);
}

function parseFormats(list: string): Format[] {
  const names = list.split(",").map((name) => name.trim()).filter(Boolean);
  if (names.length === 0) {
    throw new UsageError(`--formats needs one of ${FORMATS.join(", ")}, found "${list}".`);
  }
  for (const name of names) {
    if (FORMATS.includes(name)) continue;
    const close = closest(name, FORMATS);
    const hint = close ? `; did you mean "${close}"?` : ".";
    throw new UsageError(`--formats: a format must be one of ${FORMATS.join(", ")}, found "${name}"${hint}`);
  }
  return [...new Set(names)] as Format[];
}

/** What was asked of the formats that have a choice. */
interface Rules {
  readonly scaleRule: "floor" | "ceil";
  readonly reciprocals: boolean;
}

function optionsOf(format: ScaledFormat, { scaleRule, reciprocals }: Rules): ScaledOptions {
  const { scale } = SCALED_LAYOUTS[format];
  return { ...(scale === "e8m0" ? { scaleRule } : {}), ...(scale === "e4m3fn" ? { reciprocals } : {}) };
}

/** Throws when the blocks of a format do not divide a tensor, or it holds what no scale can cover. */
async function check(
  reader: TensorReader, { name, shape }: TensorInfo, formats: readonly Format[], rules: Rules,
): Promise<void> {
  const scaled = formats.filter((format) => !isElement(format)) as ScaledFormat[];
  if (scaled.length === 0) return;
  for (const format of scaled) blockOf(format, shape, { ...optionsOf(format, rules), name });
  const values = await reader.readTensorF32(name);
  const at = values.findIndex((value) => !Number.isFinite(value));
  if (at >= 0) {
    throw new FormatError(
      `tensor "${name}": ${scaled[0]!} needs finite values, found ${values[at]} at element ${at}.`);
  }
}

function elementEntry(
  reader: TensorReader, { name, shape }: TensorInfo, format: (typeof ELEMENT_FORMATS)[number],
): TensorEntry {
  const { bits, encode } = ELEMENTS[format];
  return {
    name: `${name}.${format}.codes`, dtype: bits === 16 ? "U16" : "U8", shape,
    async bytes() {
      const values = await reader.readTensorF32(name);
      const codes = bits === 16 ? new Uint16Array(values.length) : new Uint8Array(values.length);
      for (let i = 0; i < values.length; i++) codes[i] = encode(values[i]!);
      return new Uint8Array(codes.buffer);
    },
  };
}

function scaledEntries(
  reader: TensorReader, { name, shape }: TensorInfo, format: ScaledFormat, options: ScaledOptions,
): TensorEntry[] {
  // A file holds F32 first and U8 last, so a tensor is quantised for each of the two and not kept between.
  const make = async (): Promise<Scaled> =>
    quantizeScaled(await reader.readTensorF32(name), shape, format, { ...options, name });
  const bytesOf = ({ buffer, byteOffset, byteLength }: Uint8Array | Float32Array) =>
    new Uint8Array(buffer, byteOffset, byteLength);
  const scaleShape = scaleShapeOf(format, shape, options);
  const { scale, global } = SCALED_LAYOUTS[format];
  const of = (part: string) => `${name}.${format}.${part}`;
  return [
    { name: of("codes"), dtype: "U8", shape, bytes: async () => (await make()).codes },
    {
      name: of("scales"), dtype: scale === "f32" ? "F32" : "U8", shape: scaleShape,
      bytes: async () => bytesOf((await make()).scales),
    },
    ...(global ? [{
      name: of("global_scale"), dtype: "F32" as const, shape: [],
      bytes: async () => bytesOf(Float32Array.of((await make()).global!)),
    }] : []),
    { name: of("dequant"), dtype: "F32", shape, bytes: async () => bytesOf(dequantizeScaled(await make())) },
  ];
}

/** Writes beside the file and renames, so that it is whole or not there. */
async function writeFile(path: string, entries: readonly TensorEntry[]): Promise<void> {
  const unfinished = `${path}.tmp`;
  try {
    const file = await open(unfinished, "w");
    try {
      for await (const piece of safetensorsPieces(entries)) await file.writeFile(piece);
    } finally {
      await file.close();
    }
    await rename(unfinished, path);
  } catch (error) {
    await rm(unfinished, { force: true });
    throw error;
  }
}
