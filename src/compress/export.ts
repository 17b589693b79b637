/**
 * A quantised model as files: the published ModelOpt layout.
 *
 *   m.weight  F8_E4M3 [out, in], m.weight_scale F32 []                                          fp8
 *   m.weight  U8 [out, in / 2], m.weight_scale F8_E4M3 [out, in / 16], m.weight_scale_2 F32 []  nvfp4
 *   m.weight  F8_E4M3 [out, in], m.weight_scale U8 [out, in / 32] of E8M0 bytes                 mxfp8
 *   m.input_scale F32 [] = amax / 448 (fp8) or amax / 2688 (nvfp4) of what the layer was fed with
 *   k_proj.k_scale, v_proj.v_scale F32 [] = amax / 448, where keys and values are kept in FP8
 *
 * with config.json's own keys and `quantization_config`, and hf_quant_config.json.
 */
import { CODED_FORMATS, type CodedWeight } from "../io/quantized.ts";
import {
  INDEX_FILE, safetensorsPieces, SINGLE_FILE, type TensorEntry,
} from "../io/safetensors.ts";
import { byteLengthOf } from "../tensor/dtype.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import type { TargetFormat } from "./encode.ts";

/** Bytes of tensors in one file. */
const SHARD_BYTES = 4 * 2 ** 30;

const f32Scalar = (name: string, value: number): TensorEntry =>
  ({ name, dtype: "F32", shape: [], bytes: new Uint8Array(Float32Array.of(value).buffer) });

/**
 * The tensors of one quantised module.
 * @param inputAmax largest magnitude of its inputs; null where none was met
 */
export function codedEntries(module: string, weight: CodedWeight, inputAmax: number | null): TensorEntry[] {
  const { format, shape, codes, scales, global } = weight;
  const { bits, block } = CODED_FORMATS[format];
  const [rows, cols] = shape as [number, number];
  const entries: TensorEntry[] = [{
    name: `${module}.weight`, dtype: bits === 4 ? "U8" : "F8_E4M3", shape: [rows, (cols * bits) / 8],
    bytes: codes,
  }];
  const name = `${module}.weight_scale`;
  if (format === "fp8_e4m3") entries.push({ name, dtype: "F32", shape: [], bytes: scales });
  else entries.push({
    name, dtype: format === "nvfp4" ? "F8_E4M3" : "U8", shape: [rows, cols / block], bytes: scales,
  });
  if (format === "nvfp4") entries.push(f32Scalar(`${module}.weight_scale_2`, global));
  const most = format === "nvfp4" ? 2688 : 448;
  if (block !== 32 && inputAmax !== null) {
    entries.push(f32Scalar(`${module}.input_scale`, inputAmax > 0 ? inputAmax / most : 1));
  }
  return entries;
}

/** The scales of a layer's keys and values. */
export function kvEntries(path: string, amax: { readonly k: number; readonly v: number }): TensorEntry[] {
  return [
    f32Scalar(`${path}.k_proj.k_scale`, amax.k > 0 ? amax.k / 448 : 1),
    f32Scalar(`${path}.v_proj.v_scale`, amax.v > 0 ? amax.v / 448 : 1),
  ];
}

/**
 * The tensors as model.safetensors, or as shards with an index where they are too many bytes for one file.
 */
export function tensorFiles(
  entries: readonly TensorEntry[], limit = SHARD_BYTES,
): Record<string, string | AsyncIterable<Uint8Array>> {
  const shards: TensorEntry[][] = [[]];
  let [bytes, total] = [0, 0];
  for (const entry of entries) {
    const size = byteLengthOf(entry.dtype, sizeOf(entry.shape))!;
    if (bytes > 0 && bytes + size > limit) {
      shards.push([]);
      bytes = 0;
    }
    shards.at(-1)!.push(entry);
    bytes += size;
    total += size;
  }
  const metadata = { format: "pt" };
  if (shards.length === 1) return { [SINGLE_FILE]: safetensorsPieces(entries, metadata) };
  const digits = (n: number) => String(n).padStart(5, "0");
  const nameOf = (i: number) => `model-${digits(i + 1)}-of-${digits(shards.length)}.safetensors`;
  const weight_map = Object.fromEntries(
    shards.flatMap((shard, i) => shard.map(({ name }) => [name, nameOf(i)])));
  return {
    ...Object.fromEntries(shards.map((shard, i) => [nameOf(i), safetensorsPieces(shard, metadata)])),
    [INDEX_FILE]: `${JSON.stringify({ metadata: { total_size: total }, weight_map }, null, 2)}\n`,
  };
}

const ALGORITHM = { fp8: "FP8", nvfp4: "NVFP4", mxfp8: "MXFP8" } as const;
const GROUP = { fp8: null, nvfp4: 16, mxfp8: 32 } as const;

export interface QuantisationSummary {
  /** Formats by module. */
  readonly modules: ReadonlyMap<string, TargetFormat>;
  readonly mixed: boolean;
  readonly excluded: readonly string[];
  readonly kvCache: boolean;
  /** Version of this program. */
  readonly version: string;
}

/** What hf_quant_config.json and config.json's `quantization_config` say. */
export function quantisationConfigs(
  { modules, mixed, excluded, kvCache, version }: QuantisationSummary,
): { hf_quant_config: object; quantization_config: object } {
  const used = [...new Set(modules.values())];
  // Readers recognise the layout by the producer's name.
  const producer = { name: "modelopt", version: `krait ${version}` };
  const layerOf = (format: TargetFormat) => ({
    quant_algo: ALGORITHM[format], ...(GROUP[format] === null ? {} : { group_size: GROUP[format] }),
  });
  const quant_algo = mixed ? "MIXED_PRECISION" : ALGORITHM[used[0]!];
  const quantized_layers = Object.fromEntries([...modules].map(([name, format]) => [name, layerOf(format)]));
  const numbers = (format: TargetFormat) => ({
    dynamic: false, num_bits: format === "nvfp4" ? 4 : 8, type: "float",
    ...(GROUP[format] === null ? {} : { group_size: GROUP[format] }),
  });
  const config_groups = Object.fromEntries(used.map((format, i) => [`group_${i}`, {
    input_activations: { ...numbers(format), ...(format === "mxfp8" ? { dynamic: true } : {}) },
    weights: numbers(format),
    targets: mixed ? [...modules].filter(([, each]) => each === format).map(([name]) => name) : ["Linear"],
  }]));
  return {
    hf_quant_config: {
      producer,
      quantization: {
        quant_algo, kv_cache_quant_algo: kvCache ? "FP8" : null,
        ...(!mixed && GROUP[used[0]!] !== null ? { group_size: GROUP[used[0]!] } : {}),
        exclude_modules: excluded, ...(mixed ? { quantized_layers } : {}),
      },
    },
    quantization_config: {
      config_groups, ignore: excluded, quant_algo, producer, quant_method: "modelopt",
      ...(kvCache ? { kv_cache_scheme: { dynamic: false, num_bits: 8, type: "float" } } : {}),
      ...(mixed ? { quantized_layers } : {}),
    },
  };
}

/** The text of a config.json with one more key at its end, all else as it was. */
export function withKey(json: string, key: string, value: object): string {
  const end = json.lastIndexOf("}");
  const before = json.slice(0, end).trimEnd();
  const text = JSON.stringify(value, null, 2).replaceAll("\n", "\n  ");
  return `${before}${before.endsWith("{") ? "" : ","}\n  ${JSON.stringify(key)}: ${text}\n}\n`;
}
