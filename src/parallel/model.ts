/**
 * A model on the ranks of a layout: for every pipeline stage a `NemotronH` of the stage's layers, whose
 * parameters are sharded tensors of its ranks' shares, and who shares which of them with whom. A model on
 * one rank is a layout too, of one stage.
 */
import { bytesOf, FILE_DTYPE, type StoredParameter } from "../models/checkpoint.ts";
import { listParameters, type Parameter } from "../models/checkpoint_names.ts";
import type { NemotronHConfig } from "../models/config.ts";
import { NemotronH } from "../models/nemotron_h.ts";
import { checkFits, initialValues, type TrainedFormat, trainedFormatOf } from "../models/parameters.ts";
import { parametersOf } from "../models/part.ts";
import type { Division } from "../nn/division.ts";
import { onStage } from "../gpu/lane.ts";
import { ALONE, type Group, sendToStage } from "../ops/collectives.ts";
import type { Device } from "../tensor/device.ts";
import { bytesPerElement, decodeFloat32, type DType } from "../tensor/dtype.ts";
import { scope, unscoped } from "../tensor/scope.ts";
import { localsOf, shardedOf } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { together } from "../tensor/together.ts";
import { checkModel, type Layout, worldOf } from "./layout.ts";
import { broken, coordinatesOf, ranksPerStage, stageGroups, type StageGroupKind } from "./mesh.ts";
import { type Shard, shardOf } from "./shards.ts";
import { placeOfStage, stagesOf } from "./stages.ts";

/** A stage of the pipeline: chunk number `chunk` of pipeline rank `rank`. */
export interface ModelStage {
  readonly model: NemotronH;
  readonly rank: number;
  readonly chunk: number;
}

/** Ranks of a stage that hold the same share of a parameter. */
export interface Sharing {
  /** Those whose gradients are summed. */
  readonly group: Group;
  /** Groups that come to the same gradients by themselves: a norm counts them once. */
  readonly copies: number;
}

/** A parameter and where it lies. */
export interface PlacedParameter {
  readonly parameter: Parameter;
  readonly sharing: Sharing;
  /** Null on one rank. */
  readonly shard: Shard | null;
  /** The stages that hold it, with their ranks' shares: two for the embedding table of prediction layers. */
  readonly held: readonly { readonly stage: number; readonly tensor: Tensor }[];
}

/** Ranks divide a buffer that they share into parts of whole units of so many elements, as bindings need. */
export const PART = 128;

export class MeshModel {
  readonly config: NemotronHConfig;
  readonly layout: Layout;
  readonly stages: readonly ModelStage[];
  readonly parameters: ReadonlyMap<string, PlacedParameter>;

  private constructor(
    config: NemotronHConfig, layout: Layout, stages: readonly ModelStage[],
    parameters: ReadonlyMap<string, PlacedParameter>,
  ) {
    this.config = config;
    this.layout = layout;
    this.stages = stages;
    this.parameters = parameters;
  }

  /** A model on one rank. */
  static of(model: NemotronH, layout: Layout): MeshModel {
    const sharing = { group: ALONE, copies: 1 };
    return new MeshModel(
      model.config, layout, [{ model, rank: 0, chunk: 0 }],
      new Map(listParameters(model.config).flatMap((parameter) => {
        const tensor = model.parameters.get(parameter.name);
        const placed = { parameter, sharing, shard: null, held: tensor ? [{ stage: 0, tensor }] : [] };
        return [[parameter.name, placed]];
      })));
  }

  /**
   * A model of any contents.
   * @param devices that of every rank
   * @param bucket_size parameters in a buffer at most, a larger one by itself: their gradients are summed
   *   over ranks in one go. In the first pipeline rank alone, others have the largest that can be bound.
   * @throws UsageError where the layout does not fit the model; OutOfMemoryError where the model does not
   *   fit a device
   */
  static on(
    devices: readonly Device[], layout: Layout, config: NemotronHConfig, weights: TrainedFormat = "f32",
    bucket_size = Infinity,
  ): MeshModel {
    checkModel(layout, config);
    if (worldOf(layout) === 1) checkFits(devices[0]!, config, weights);
    const groups = groupsBy(layout);
    const division = divisionOf(layout, groups);
    const perStage = ranksPerStage(layout);
    const placed = new Map(listParameters(config).map((parameter): [string, PlacedParameter & {
      held: { stage: number; tensor: Tensor }[];
    }] => {
      const shard = shardOf(parameter, config, layout);
      return [parameter.name, { parameter, shard, sharing: { group: ALONE, copies: 1 }, held: [] }];
    }));
    const cuts = stagesOf(layout, config);
    const empty = cuts.findIndex((part) => parametersOf(config, part).length === 0);
    if (empty >= 0) {
      const expected = "layers, the embedding, the prediction block or the head";
      broken("a stage that is trained holds something", expected, `nothing in stage ${empty}`);
    }
    const stages = unscoped(() => cuts.map((part, stage): ModelStage => {
      const { rank, chunk } = placeOfStage(layout, stage);
      const ranks = devices.slice(rank * perStage, (rank + 1) * perStage);
      const members = parametersOf(config, part);
      const isTied = layout.pp * layout.vpp > 1 && config.num_nextn_predict_layers > 0;
      const parameters = new Map<string, Tensor>();
      for (const { sharing, format, list } of byMemory(members, (parameter) => {
        const { shard } = placed.get(parameter.name)!;
        return sharingOf(shard!, layout, groups, isTied && parameter.kind === "embedding");
      }, weights)) {
        const unit = PART * sharing.group.members[0]!.length;
        const shapes = list.map(({ name }) => placed.get(name)!.shard!.shape);
        const tensors = scope(() => {
          const most = rank === 0 ? bucket_size : Infinity;
          const locals = ranks.map((device) => together(device, shapes, format, unit, most));
          return list.map((_, i) => shardedOf(locals.map((of) => of[i]!)));
        });
        list.forEach((parameter, i) => {
          const tensor = tensors[i]!;
          tensor.requiresGrad = parameter.trainable;
          parameters.set(parameter.name, tensor);
          const entry = placed.get(parameter.name)!;
          placed.set(parameter.name, { ...entry, sharing, held: [...entry.held, { stage, tensor }] });
        });
      }
      return { model: new NemotronH(config, parameters, new Map(), { division, part }), rank, chunk };
    }));
    return new MeshModel(config, layout, stages, placed);
  }

  /** Ranks in all. */
  get world(): number {
    return worldOf(this.layout);
  }

  /** Devices of the ranks, each once. */
  get devices(): Device[] {
    return [...new Set(this.stages.flatMap(({ model }) =>
      [...model.parameters.values()].slice(0, 1).flatMap(localsOf).map(({ device }) => device)))];
  }

  /** Runs `body` as work of a stage's ranks: for traces. */
  onStage<T>(stage: number, pass: string, body: () => T): T {
    return onStage(this.#firstRank(stage), pass, body);
  }

  /** What every rank of a stage has, on those of another stage. */
  sendTo(x: Tensor, from: number, to: number): Tensor {
    const [any] = this.stages[to]!.model.parameters.values();
    const devices = localsOf(any!).map(({ device }) => device);
    return this.onStage(from, "", () =>
      sendToStage(x, devices, this.#firstRank(to) - this.#firstRank(from)));
  }

  #firstRank(stage: number): number {
    return this.stages[stage]!.rank * ranksPerStage(this.layout);
  }

  /** Draws initial weights: the same for a seed under every layout. */
  initialise(seed: number): void {
    listParameters(this.config).forEach((parameter, i) =>
      this.write(parameter.name, initialValues(this.config, parameter, { seed, stream: i, step: 0 })));
  }

  /** Gives every rank its share of a parameter. */
  write(name: string, values: Float32Array): void {
    const { shard, held } = this.parameters.get(name)!;
    for (const { tensor } of held) {
      localsOf(tensor).forEach((local, rank) => local.write(
        shard ? shard.slice(values, this.coordinates(rank)) : values));
    }
  }

  /** A parameter put together from its shares, as it is stored. */
  stored(name: string): StoredParameter {
    const { shard, held } = this.parameters.get(name)!;
    const locals = localsOf(held[0]!.tensor);
    const { dtype } = locals[0]!;
    if (!shard) return { dtype, bytes: () => bytesOf(locals[0]!) };
    return {
      dtype,
      bytes: async () => {
        const pieces: Elements[] = [];
        for (let rank = locals.length - 1; rank >= 0; rank--) {
          const index = shard.indexOf(this.coordinates(rank));
          pieces[index] ??= elementsOf(FILE_DTYPE[dtype], await bytesOf(locals[rank]!));
        }
        return bytesOfElements(shard.join(pieces));
      },
    };
  }

  /** A parameter put together from its shares. f32 */
  async read(name: string): Promise<Float32Array> {
    const { dtype, bytes } = this.stored(name);
    return decodeFloat32(FILE_DTYPE[dtype], await bytes());
  }

  /** Where a rank of a stage, by its number there, stands on all axes but pp. */
  coordinates(rank: number): ReturnType<typeof coordinatesOf> {
    return coordinatesOf({ ...this.layout, pp: 1 }, rank);
  }

  dispose(): void {
    for (const { model } of this.stages) model.dispose();
  }
}

/** Elements as numbers of their width. */
export type Elements = Float32Array | Uint16Array | Uint8Array;

/** Bytes of a dtype of one, two or four bytes as elements. */
export function elementsOf(dtype: DType, { buffer, byteOffset, byteLength }: Uint8Array): Elements {
  switch (bytesPerElement(dtype)) {
    case 4: return new Float32Array(buffer, byteOffset, byteLength / 4);
    case 2: return new Uint16Array(buffer, byteOffset, byteLength / 2);
    default: return new Uint8Array(buffer, byteOffset, byteLength);
  }
}

export function bytesOfElements({ buffer, byteOffset, byteLength }: Elements): Uint8Array {
  return new Uint8Array(buffer, byteOffset, byteLength);
}

type Groups = Readonly<Record<StageGroupKind, Group>>;

function groupsBy(layout: Layout): Groups {
  const kinds = ["tp", "cp", "dp", "tp-cp", "dp-cp", "tp-dp-cp", "etp", "ep", "edp", "etp-ep"] as const;
  return Object.fromEntries(kinds.map((name): [string, Group] =>
    [name, { name, members: stageGroups(layout, name), algorithm: layout.algorithm }])) as Groups;
}

/** How the ranks of a stage divide its layers. */
export function divisionOf(layout: Layout, groups: Groups = groupsBy(layout)): Division {
  return {
    tp: groups.tp, sp: layout.sp, cp: groups.cp, cp_kind: layout.cp_kind, ep: groups.ep, etp: groups.etp,
    dispatcher: layout.dispatcher,
    expert_budget: layout.expert_budget ?? undefined,
    // Without sequence parallel the ranks of tp have the same tokens.
    tokens: groups[layout.sp ? "tp-cp" : "cp"], all_tokens: groups[layout.sp ? "tp-dp-cp" : "dp-cp"],
  };
}

/** @param twice whether another stage holds it too, and has the same gradient in the end */
function sharingOf(shard: Shard, layout: Layout, groups: Groups, twice: boolean): Sharing {
  if (shard.expert) return { group: groups.edp, copies: 1 };
  if (shard.copies === 1) return { group: groups["dp-cp"], copies: twice ? 2 : 1 };
  if (shard.cuts.length > 0) return { group: neighbours(layout, shard.copies), copies: 1 };
  // Norms, routers and what else is whole on every rank of tp: each sees its own positions, or all the same.
  if (layout.sp) return { group: groups["tp-dp-cp"], copies: 1 };
  return { group: groups["dp-cp"], copies: layout.tp };
}

/** Ranks with the same keys and values: so many neighbours on tp, and all of dp and cp. */
function neighbours(layout: Layout, copies: number): Group {
  const { tp, cp, dp, algorithm } = layout;
  const members = Array.from({ length: tp / copies }, (_, piece) =>
    Array.from({ length: cp * dp }, (_replica, at) =>
      Array.from({ length: copies }, (_copy, i) => at * tp + piece * copies + i)).flat());
  return { name: "tp-dp-cp of equal heads", members, algorithm };
}

/** Parameters that can lie in one buffer: of one format, and shared by the same ranks. */
function byMemory(
  parameters: readonly Parameter[], sharing: (parameter: Parameter) => Sharing, weights: TrainedFormat,
): { sharing: Sharing; format: TrainedFormat; list: Parameter[] }[] {
  const groups = new Map<string, { sharing: Sharing; format: TrainedFormat; list: Parameter[] }>();
  for (const parameter of parameters) {
    const shared = sharing(parameter);
    const format = trainedFormatOf(parameter, weights);
    const key = JSON.stringify([shared.group.members, shared.copies, format, parameter.trainable]);
    const group = groups.get(key);
    if (group) group.list.push(parameter);
    else groups.set(key, { sharing: shared, format, list: [parameter] });
  }
  return [...groups.values()];
}
