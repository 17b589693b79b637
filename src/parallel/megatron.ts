/**
 * A checkpoint in Megatron Core's layout: its names for the parameters of hybrid models, cut over tensor,
 * expert and pipeline ranks as its own legacy checkpoints are, one safetensors file per model-parallel rank;
 * and the way back. A script beside the files makes the pickled files of them that Megatron Core loads.
 *
 * What differs from published checkpoints: the norm of a layer belongs to the projection behind it; q, k and
 * v are one matrix, for every group of query heads [queries | key | value]; experts and layers are numbered
 * within their rank; the prediction block lies one level deeper. Tested in test/parallel/megatron.test.ts.
 */
import type { Folder } from "../io/files.ts";
import { readAll } from "../io/files.ts";
import { isObject, parseJson } from "../io/json.ts";
import { storedFormat } from "../io/quantized.ts";
import { openSafetensors, safetensorsPieces } from "../io/safetensors.ts";
import type { TensorEntry, TensorReader } from "../io/safetensors.ts";
import { listParameters, resolveTensors, tensorsOf } from "../models/checkpoint_names.ts";
import type { Parameter } from "../models/checkpoint_names.ts";
import { layerSpecs, mtpSpecs, parseConfig } from "../models/config.ts";
import type { LayerSpec, NemotronHConfig } from "../models/config.ts";
import { endsChain } from "../models/part.ts";
import type { Part } from "../models/part.ts";
import type { DType } from "../tensor/dtype.ts";
import { FormatError, UsageError } from "../tensor/errors.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { checkModel, formatLayout, parseLayout, worldOf } from "./layout.ts";
import type { Layout } from "./layout.ts";
import { ranksPerStage } from "./mesh.ts";
import { putPiece, shardOf, takePiece } from "./shards.ts";
import type { Cut, Values } from "./shards.ts";
import { stageAt, stagesOf } from "./stages.ts";

/** What the folder says of itself, in index.json. */
const FORMAT = "krait-megatron-export";
export const MEGATRON_INDEX = "index.json";
const INDEX_LIMIT = 64 * 2 ** 20;

/** One model-parallel rank of Megatron Core, and its file. */
export interface MegatronRank {
  readonly file: string;
  /** The folder of Megatron Core's own checkpoint: mp_rank_TP[_PPP][_EEE]. */
  readonly folder: string;
  readonly tp: number;
  readonly pp: number;
  readonly ep: number;
  readonly etp: number;
}

/** A parameter of Megatron Core before it is cut. */
interface WholeTensor {
  /** Name within a chunk. */
  readonly name: string;
  /** Tensors of the published checkpoint that it is made of: one, or those of q, k and v. */
  readonly sources: readonly string[];
  readonly shape: readonly number[];
  readonly cut: Cut | null;
  /** Number of the expert that it belongs to. */
  readonly expert: number | null;
}

/**
 * The model-parallel ranks of a layout, in the order of their files.
 * @throws UsageError when names of tp, pp and ep do not tell the ranks apart
 */
export function megatronRanks(layout: Layout): MegatronRank[] {
  const { tp, pp, ep, etp } = layout;
  if (tp % etp !== 0) {
    throw new UsageError(
      `Megatron Core names checkpoint files by tp, pp and ep: expected an etp that divides tp=${tp}, `
      + `found etp=${etp}.`);
  }
  const ranks = new Map<string, MegatronRank>();
  for (let stage = 0; stage < pp; stage++) {
    for (let rank = 0; rank < ranksPerStage(layout); rank++) {
      const at = { tp: rank % tp, pp: stage, ep: Math.floor(rank / etp) % ep, etp: rank % etp };
      const digits = (n: number, count: number) => String(n).padStart(count, "0");
      const folder = `mp_rank_${digits(at.tp, 2)}${pp > 1 ? `_${digits(at.pp, 3)}` : ""}`
        + `${ep > 1 ? `_${digits(at.ep, 3)}` : ""}`;
      ranks.set(folder, { file: `${folder}.safetensors`, folder, ...at });
    }
  }
  return [...ranks.values()].toSorted((a, b) => (a.folder < b.folder ? -1 : 1));
}

/**
 * Checks that Megatron Core's hybrid model can be this one.
 * @throws UsageError that names the key of the configuration
 */
export function checkMegatron(config: NemotronHConfig, layout: Layout): void {
  checkModel(layout, config);
  const refuse = (key: string, expected: string, found: unknown): never => {
    throw new UsageError(
      `Megatron Core's hybrid model needs ${key} to be ${expected}, found ${String(found)}.`);
  };
  for (const key of ["use_bias", "attention_bias", "mlp_bias"] as const) {
    if (config[key]) refuse(key, "false", true);
  }
  if (!config.use_conv_bias) refuse("use_conv_bias", "true", false);
  if (config.conv_kernel !== 4) refuse("conv_kernel", "4", config.conv_kernel);
  if (config.dt_min_clamp) refuse("dt_min_clamp", "false", true);
  const specs = [...layerSpecs(config), ...mtpSpecs(config)];
  for (const [kind, name] of [["mlp", "MLP"], ["moe", "MoE"]] as const) {
    const kinds = new Set(specs.filter((spec) => spec.kind === kind).map((spec) => JSON.stringify(spec)));
    if (kinds.size > 1) refuse(`all ${name} layers`, "alike", `${kinds.size} kinds`);
  }
  const routed = specs.find(({ kind }) => kind === "moe");
  if (routed?.kind === "moe") checkRouter(config, routed.num_experts_per_tok, refuse);
  // Its layer pattern has no place for the prediction block but the end.
  if (stagesOf(layout, config).some(({ mtp, head }) => mtp && !head)) {
    refuse("the prediction block", "in the stage of the head", "another stage");
  }
  megatronRanks(layout);
}

function checkRouter(
  config: NemotronHConfig, topk: number, refuse: (key: string, expected: string, found: unknown) => void,
): void {
  const { scoring_func: score, router_choice: choice, n_group: groups, topk_group: kept } = config;
  if (!config.norm_topk_prob) refuse("norm_topk_prob", "true", false);
  // Other scores take no expert bias there.
  if (score !== "sigmoid" && score !== "sqrtsoftplus") {
    refuse("scoring_func", "sigmoid or sqrtsoftplus", score);
  }
  if (choice !== "score") refuse("router_choice", "score", choice);
  if (groups > 1 && config.group_best !== topk / kept) {
    refuse("group_best", `num_experts_per_tok / topk_group = ${topk / kept}`, config.group_best);
  }
}

/** The tensors of a chunk before they are cut, with Megatron Core's names. */
function chunkTensors(config: NemotronHConfig, layout: Layout, stage: Part): WholeTensor[] {
  const parameters = new Map(listParameters(config).map((parameter) => [parameter.name, parameter]));
  const list: WholeTensor[] = [];
  const single = (name: string, source: string): void => {
    const parameter = parameters.get(source)!;
    const { cuts } = shardOf(parameter, config, layout);
    list.push({ name, sources: [source], shape: parameter.shape, cut: cuts[0] ?? null, expert: null });
  };
  const embedding = () => single("embedding.word_embeddings.weight", "backbone.embeddings.weight");
  if (stage.embedding) embedding();
  const specs = layerSpecs(config);
  for (let layer = stage.from; layer < stage.to; layer++) {
    const at = `decoder.layers.${layer - stage.from}`;
    list.push(...layerTensors(config, layout, parameters, specs[layer]!, `backbone.layers.${layer}`, at));
  }
  if (endsChain(stage, config)) single("decoder.final_norm.weight", "backbone.norm_f.weight");
  if (stage.mtp) {
    // The stage of the prediction block has a copy of the table.
    if (!stage.embedding) embedding();
    const blocks = mtpSpecs(config);
    for (const name of ["enorm", "hnorm"].map((each) => `mtp.layers.0.${each}.weight`)) single(name, name);
    // Column-parallel there, with its output gathered.
    const join = parameters.get("mtp.layers.0.eh_proj.weight")!;
    list.push({
      name: join.name, sources: [join.name], shape: join.shape, expert: null,
      cut: rowCut(layout.tp, join.shape[0]!, "tp", 0),
    });
    blocks.forEach((spec, i) => list.push(...layerTensors(
      config, layout, parameters, spec, `mtp.layers.${i}`, `mtp.layers.0.mtp_model_layer.layers.${i}`)));
    single("mtp.layers.0.final_layernorm.weight", `mtp.layers.${blocks.length - 1}.final_layernorm.weight`);
  }
  if (stage.head) single("output_layer.weight", "lm_head.weight");
  return list;
}

function rowCut(ranks: number, extent: number, axis: "tp" | "etp", dim: number): Cut | null {
  return ranks === 1 ? null : { axis, dim, sections: [extent], ranks, pieces: ranks };
}

function layerTensors(
  config: NemotronHConfig, layout: Layout, parameters: ReadonlyMap<string, Parameter>, spec: LayerSpec,
  from: string, to: string,
): WholeTensor[] {
  const list: WholeTensor[] = [];
  const single = (name: string, source: string): void => {
    const parameter = parameters.get(`${from}.${source}`)!;
    const { cuts } = shardOf(parameter, config, layout);
    list.push({
      name: `${to}.${name}`, sources: [parameter.name], shape: parameter.shape, cut: cuts[0] ?? null,
      expert: null,
    });
  };
  switch (spec.kind) {
    case "mamba":
      single("mixer.in_proj.layer_norm_weight", "norm.weight");
      for (const name of [
        "in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias", "norm.weight",
        "out_proj.weight",
      ]) single(`mixer.${name}`, `mixer.${name}`);
      break;
    case "attention": {
      const { num_attention_heads: heads, num_key_value_heads: kv, head_dim: dim } = config;
      const rows = (heads + 2 * kv) * dim;
      if (rows % layout.tp !== 0) {
        throw new UsageError(
          `tp must divide the ${rows} rows of queries, keys and values, found ${layout.tp}.`);
      }
      single("self_attention.linear_qkv.layer_norm_weight", "norm.weight");
      list.push({
        name: `${to}.self_attention.linear_qkv.weight`,
        sources: ["q", "k", "v"].map((letter) => `${from}.mixer.${letter}_proj.weight`),
        shape: [rows, config.hidden_size], cut: rowCut(layout.tp, rows, "tp", 0), expert: null,
      });
      single("self_attention.linear_proj.weight", "mixer.o_proj.weight");
      break;
    }
    case "mlp":
      single("mlp.linear_fc1.layer_norm_weight", "norm.weight");
      single("mlp.linear_fc1.weight", "mixer.up_proj.weight");
      single("mlp.linear_fc2.weight", "mixer.down_proj.weight");
      break;
    case "moe": {
      single("pre_mlp_layernorm.weight", "norm.weight");
      single("mlp.router.weight", "mixer.gate.weight");
      single("mlp.router.expert_bias", "mixer.gate.e_score_correction_bias");
      if (spec.moe_latent_size !== null) {
        single("mlp.fc1_latent_proj.weight", "mixer.fc1_latent_proj.weight");
        single("mlp.fc2_latent_proj.weight", "mixer.fc2_latent_proj.weight");
      }
      const local = spec.n_routed_experts / layout.ep;
      for (const [name, leaf, dim] of [["fc1", "up_proj", 0], ["fc2", "down_proj", 1]] as const) {
        const stacked = parameters.get(`${from}.mixer.experts.${leaf}`)!;
        for (const { name: source, shape, expert } of tensorsOf(stacked)) {
          list.push({
            name: `${to}.mlp.experts.linear_${name}.weight${expert! % local}`, sources: [source], shape,
            cut: rowCut(layout.etp, shape[dim]!, "etp", dim), expert,
          });
        }
      }
      if (spec.shared_size > 0) {
        single("mlp.shared_experts.linear_fc1.weight", "mixer.shared_experts.up_proj.weight");
        single("mlp.shared_experts.linear_fc2.weight", "mixer.shared_experts.down_proj.weight");
        if (config.shared_expert_gate) {
          single("mlp.shared_experts.gate_weight", "mixer.shared_expert_gate.weight");
        }
      }
    }
  }
  return list;
}

/** The chunks of a pipeline rank with their stages. */
function chunksOf(
  config: NemotronHConfig, layout: Layout, pp: number,
): { prefix: string; tensors: WholeTensor[] }[] {
  const stages = stagesOf(layout, config);
  return Array.from({ length: layout.vpp }, (_, chunk) => ({
    // Megatron Core keeps the chunks of an interleaved pipeline apart as model0, model1, ...
    prefix: layout.vpp > 1 ? `model${chunk}.` : "",
    tensors: chunkTensors(config, layout, stages[stageAt(layout, pp, chunk)]!),
  }));
}

/** Whether a rank holds a tensor: experts lie on their ep rank, all else on all ranks of the stage. */
function isOn(rank: MegatronRank, { expert }: WholeTensor, config: NemotronHConfig, layout: Layout): boolean {
  if (expert === null) return true;
  const experts = layerSpecs(config).concat(mtpSpecs(config)).find(({ kind }) => kind === "moe");
  return experts?.kind === "moe" && Math.floor(expert / (experts.n_routed_experts / layout.ep)) === rank.ep;
}

function localShape({ shape, cut }: WholeTensor): readonly number[] {
  return cut ? shape.with(cut.dim, shape[cut.dim]! / cut.pieces) : shape;
}

// Queries, keys and values as one matrix.

/** Calls `move` for every run of rows that lies together in the packed matrix and in one of q, k and v. */
function walkGroups(
  config: NemotronHConfig, move: (packed: number, part: 0 | 1 | 2, row: number, rows: number) => void,
): void {
  const { num_attention_heads: heads, num_key_value_heads: groups, head_dim: dim } = config;
  const queries = (heads / groups) * dim;
  for (let group = 0; group < groups; group++) {
    const at = group * (queries + 2 * dim);
    move(at, 0, group * queries, queries);
    move(at + queries, 1, group * dim, dim);
    move(at + queries + dim, 2, group * dim, dim);
  }
}

function emptyOf<V extends Values>(values: V, length: number): V {
  return new (values.constructor as new (length: number) => V)(length);
}

/** [queries | key | value] for every group. */
export function packQkv<V extends Values>(config: NemotronHConfig, parts: readonly V[]): V {
  const { hidden_size: width } = config;
  const packed = emptyOf(parts[0]!, parts.reduce((sum, part) => sum + part.length, 0));
  walkGroups(config, (at, part, row, rows) =>
    packed.set(parts[part]!.subarray(row * width, (row + rows) * width) as V, at * width));
  return packed;
}

/** The contrary of packQkv. */
export function unpackQkv<V extends Values>(config: NemotronHConfig, packed: V): V[] {
  const { num_attention_heads: heads, num_key_value_heads: kv, head_dim: dim, hidden_size: width } = config;
  const parts = [heads, kv, kv].map((count) => emptyOf(packed, count * dim * width));
  walkGroups(config, (at, part, row, rows) =>
    parts[part]!.set(packed.subarray(at * width, (at + rows) * width) as V, row * width));
  return parts;
}

// Tensors as they are stored.

const STORED = { F32: Float32Array, BF16: Uint16Array, F16: Uint16Array } as const;
type StoredDType = keyof typeof STORED;

function storedDType(what: string, dtype: DType): StoredDType {
  if (dtype === "F32" || dtype === "BF16" || dtype === "F16") return dtype;
  throw new FormatError(`${what}: expected F32, BF16 or F16, found ${dtype}`);
}

/** Bytes as numbers of their format, without a change of bits. */
function valuesOf(dtype: StoredDType, bytes: Uint8Array): Values {
  return new STORED[dtype](new Uint8Array(bytes).buffer);
}

function bytesOf(values: Values): Uint8Array {
  return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}

/** A tensor of a published checkpoint, wherever it lies. */
interface Source {
  readonly dtype: StoredDType;
  read(): Promise<Values>;
}

/**
 * The tensors of a checkpoint by their published names, experts one by one.
 * @throws FormatError for what is missing, of another shape, or quantised
 */
function sourcesOf(config: NemotronHConfig, reader: TensorReader, what: string): Map<string, Source> {
  const sources = new Map<string, Source>();
  for (const { parameter, from, tensors } of resolveTensors(config, reader.tensors, { what })) {
    if (from === "zeros") continue;
    const parts = tensorsOf(parameter);
    parts.forEach(({ name, shape }, i) => {
      const tensor = tensors[from === "whole" ? 0 : i]!;
      const format = storedFormat(reader.tensors, tensor);
      if (format !== null) {
        throw new FormatError(
          `${what}: tensor "${tensor}": expected F32, BF16 or F16, found codes of ${format}`);
      }
      const dtype = storedDType(`${what}: tensor "${tensor}"`, reader.info(tensor).dtype);
      const count = sizeOf(shape);
      const range = from === "whole" && parts.length > 1 ? { start: i * count, count } : undefined;
      sources.set(name, { dtype, read: async () => valuesOf(dtype, await reader.read(tensor, range)) });
    });
  }
  return sources;
}

/**
 * The files of a checkpoint in Megatron Core's layout: index.json, and one file for each model-parallel rank,
 * whose tensors are read from `reader` when their turn comes.
 * @param what name of the checkpoint for messages
 * @throws UsageError for what Megatron Core cannot be; FormatError for a checkpoint that does not fit
 */
export function megatronFiles(
  config: NemotronHConfig, reader: TensorReader, layout: Layout, what: string,
): Record<string, string | AsyncIterable<Uint8Array>> {
  checkMegatron(config, layout);
  const sources = sourcesOf(config, reader, what);
  const ranks = megatronRanks(layout);
  const files: Record<string, string | AsyncIterable<Uint8Array>> = {};
  for (const rank of ranks) {
    const entries = chunksOf(config, layout, rank.pp).flatMap(({ prefix, tensors }) =>
      tensors.filter((tensor) => isOn(rank, tensor, config, layout))
        .map((tensor) => entryOf(config, tensor, prefix, rank, sources, what)));
    files[rank.file] = safetensorsPieces(entries, { format: "pt" });
  }
  const index = { format: FORMAT, version: 1, layout: formatLayout(layout), world: worldOf(layout), ranks };
  return { [MEGATRON_INDEX]: `${JSON.stringify(index, null, 1)}\n`, ...files };
}

function entryOf(
  config: NemotronHConfig, tensor: WholeTensor, prefix: string, rank: MegatronRank,
  sources: ReadonlyMap<string, Source>, what: string,
): TensorEntry {
  const { name, shape, cut } = tensor;
  const parts = tensor.sources.map((source) => sources.get(source)!);
  const { dtype } = parts[0]!;
  const other = parts.findIndex((part) => part.dtype !== dtype);
  if (other >= 0) {
    throw new FormatError(
      `${what}: tensor "${tensor.sources[other]!}": expected ${dtype} as "${tensor.sources[0]!}", `
      + `found ${parts[other]!.dtype}`);
  }
  return {
    name: prefix + name, dtype, shape: localShape(tensor),
    bytes: async () => {
      const values: Values[] = [];
      for (const part of parts) values.push(await part.read());
      const whole = values.length === 1 ? values[0]! : packQkv(config, values);
      return bytesOf(cut ? takePiece(whole, shape, cut, pieceOf(cut, rank[cut.axis])) : whole);
    },
  };
}

function pieceOf(cut: Cut, rank: number): number {
  return Math.floor((rank * cut.pieces) / cut.ranks);
}

/** A folder that megatronFiles wrote, with the way back. */
export interface MegatronFolder {
  readonly config: NemotronHConfig;
  readonly layout: Layout;
  /** The tensors of the published checkpoint, joined when their turn comes. */
  readonly entries: readonly TensorEntry[];
  close(): Promise<void>;
}

/**
 * Opens a folder that megatronFiles wrote, which has config.json beside it.
 * @throws FormatError for a missing or damaged file, and for a tensor of another format or shape
 */
export async function openMegatron(folder: Folder): Promise<MegatronFolder> {
  const text = async (file: string): Promise<Uint8Array> => {
    const source = await folder.open(file);
    if (!source) throw new FormatError(`${folder.name}: expected ${file}, found no file`);
    try {
      return await readAll(source, INDEX_LIMIT);
    } finally {
      await source.close();
    }
  };
  const what = `${folder.name}/${MEGATRON_INDEX}`;
  const index = parseJson(await text(MEGATRON_INDEX), { what });
  if (!isObject(index) || index["format"] !== FORMAT || index["version"] !== 1) {
    throw new FormatError(`${what}: expected format "${FORMAT}" version 1, found something else`);
  }
  if (typeof index["layout"] !== "string") throw new FormatError(`${what}: expected a "layout", found none`);
  const config = parseConfig(await text("config.json"), { what: `${folder.name}/config.json` });
  const layout = parseLayout(index["layout"]);
  checkMegatron(config, layout);
  const readers: TensorReader[] = [];
  const close = async (): Promise<void> => {
    for (const reader of readers) await reader.close();
  };
  try {
    const byRank = new Map<MegatronRank, TensorReader>();
    for (const rank of megatronRanks(layout)) {
      const source = await folder.open(rank.file);
      if (!source) throw new FormatError(`${folder.name}: expected ${rank.file}, found no file`);
      const reader = await openSafetensors(source);
      readers.push(reader);
      byRank.set(rank, reader);
    }
    return { config, layout, entries: joinedEntries(config, layout, byRank), close };
  } catch (error) {
    await close();
    throw error;
  }
}

function joinedEntries(
  config: NemotronHConfig, layout: Layout, byRank: ReadonlyMap<MegatronRank, TensorReader>,
): TensorEntry[] {
  const shapes = new Map(listParameters(config).flatMap(tensorsOf).map(({ name, shape }) => [name, shape]));
  const entries = new Map<string, TensorEntry>();
  for (let pp = 0; pp < layout.pp; pp++) {
    for (const { prefix, tensors } of chunksOf(config, layout, pp)) {
      for (const tensor of tensors) {
        const holders = [...byRank].filter(([rank]) =>
          rank.pp === pp && isOn(rank, tensor, config, layout));
        const dtype = checkStored(prefix, tensor, holders);
        tensor.sources.forEach((name, i) => {
          // The table is there twice where the prediction block lies in another stage.
          if (entries.has(name)) return;
          entries.set(name, {
            name, dtype, shape: shapes.get(name)!,
            bytes: async () => bytesOf((await joinTensor(config, prefix, tensor, dtype, holders))[i]!),
          });
        });
      }
    }
  }
  return [...shapes.keys()].map((name) => entries.get(name)!);
}

/** The format of a tensor, the same on all its ranks. */
function checkStored(
  prefix: string, tensor: WholeTensor, holders: readonly (readonly [MegatronRank, TensorReader])[],
): StoredDType {
  const shape = localShape(tensor).join(", ");
  const formats = new Set<DType>();
  for (const [rank, reader] of holders) {
    const found = reader.tensors.get(prefix + tensor.name);
    if (!found || found.shape.join(", ") !== shape) {
      const has = found ? `[${found.shape.join(", ")}]` : "none";
      throw new FormatError(
        `${rank.file}: tensor "${prefix}${tensor.name}": expected [${shape}], found ${has}`);
    }
    formats.add(found.dtype);
  }
  const [dtype, other] = formats;
  if (other) {
    throw new FormatError(`tensor "${tensor.name}": expected ${dtype!} on all ranks, found ${other}`);
  }
  return storedDType(`tensor "${tensor.name}"`, dtype!);
}

async function joinTensor(
  config: NemotronHConfig, prefix: string, { name, sources, shape, cut }: WholeTensor, dtype: StoredDType,
  holders: readonly (readonly [MegatronRank, TensorReader])[],
): Promise<Values[]> {
  const read = async (reader: TensorReader) => valuesOf(dtype, await reader.read(prefix + name));
  let whole: Values;
  if (!cut) whole = await read(holders[0]![1]);
  else {
    whole = new STORED[dtype](sizeOf(shape));
    for (let piece = 0; piece < cut.pieces; piece++) {
      const [, reader] = holders.find(([rank]) => pieceOf(cut, rank[cut.axis]) === piece)!;
      putPiece(whole, await read(reader), shape, cut, piece);
    }
  }
  return sources.length === 1 ? [whole] : unpackQkv(config, whole);
}
