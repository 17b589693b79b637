import { GpuError } from "../gpu/errors.ts";
import type { BufferView, Gpu } from "../gpu/gpu.ts";
import type { PooledBuffer } from "../gpu/pool.ts";
import { manifest } from "./manifest.ts";
import { pipelinesOf } from "./pipelines.ts";

type Manifest = typeof manifest;
/** Name of a kernel file, such as "norm/rms_norm". */
export type KernelName = keyof Manifest;

export interface LaunchOptions<K extends KernelName> {
  /** Entry point; may be left out where the file has one. */
  readonly entry?: keyof Manifest[K]["entries"] & string;
  /** A tensor for every storage variable that the entry uses, by its name in the shader. */
  readonly bind: { readonly [name in keyof Manifest[K]["bindings"]]?: BufferView };
  /** Every field of the shader's `Params`. */
  readonly params?: { readonly [field in keyof Manifest[K]["params"]]: number };
  /** Values for overrides; the shader's own defaults otherwise. */
  readonly constants?: { readonly [name in keyof Manifest[K]["overrides"]]?: number };
  /** Link-time conditions that hold. */
  readonly conditions?: readonly Manifest[K]["conditions"][number][];
  /** Workgroups: `[n]` is folded into two dimensions when it is large. */
  readonly workgroups: readonly [number] | readonly [number, number] | readonly [number, number, number];
}

interface KernelShape {
  readonly bindings: Readonly<Record<string, { binding: number; access: "read" | "read_write" }>>;
  readonly params: Readonly<Record<string, "u32" | "i32" | "f32">>;
  readonly overrides: Readonly<Record<string, string>>;
  readonly conditions: readonly string[];
  readonly entries: Readonly<Record<string, readonly string[]>>;
}

/** What a launch needs to know of an entry point, worked out once: most of a launch's time is the host's. */
interface EntryPlan {
  readonly entry: string;
  readonly shape: KernelShape;
  readonly slots: readonly { name: string; binding: number; access: "read" | "read_write" }[];
  readonly fields: readonly { name: string; type: "u32" | "i32" | "f32" }[];
  readonly usesParams: boolean;
  /** The bytes of `scratch` that hold the parameters. */
  readonly uniforms: Uint8Array;
}

const MAX_GROUPS = 65535; // the default maxComputeWorkgroupsPerDimension
const scratch = new DataView(new ArrayBuffer(256));
const plans = new Map<string, EntryPlan>();

/** One launch as an observer sees it. */
export interface Launched {
  readonly bind: Readonly<Record<string, BufferView | undefined>>;
  readonly params: Readonly<Record<string, number>>;
  readonly conditions: readonly string[];
  /** False for a grid of no workgroups, and for the rehearsal of a capture. */
  readonly recorded: boolean;
}

/** Called at every launch: the op suite sees what was reached, the bench what a step moves and computes. */
export const launchObservers = new Set<(kernel: string, entry: string, launched: Launched) => void>();

/**
 * Records one dispatch of a kernel on the device of the bound tensors. Nothing runs yet.
 * @throws GpuError for a missing or unknown binding, parameter, override or condition, for tensors of two
 *   devices, and for a buffer bound as writable and a second time.
 */
export function launch<K extends KernelName>(kernel: K, options: LaunchOptions<K>): void {
  const plan = planOf(kernel, options.entry);
  const { entry, shape, slots, usesParams } = plan;
  const bind = options.bind as Readonly<Record<string, BufferView | undefined>>;
  const views: { binding: number; view: BufferView }[] = [];
  const touched: PooledBuffer[] = [];
  let gpu: Gpu | null = null;
  for (const { name, binding } of slots) {
    const view = bind[name];
    if (!view) {
      throw new GpuError(`Kernel ${kernel} (${entry}) needs a tensor for ${name}, but none was bound.`);
    }
    if (gpu && view.device !== gpu) {
      throw new GpuError(`Kernel ${kernel} (${entry}): ${name} lies on another device.`);
    }
    gpu = view.device;
    views.push({ binding, view });
    touched.push(view.storage);
  }
  let bound = 0;
  for (const name in bind) if (bind[name]) bound++;
  if (bound > slots.length) refuseBinding(kernel, plan, bind);
  if (!gpu) throw new GpuError(`Kernel ${kernel} (${entry}) was launched without tensors.`);
  gpu.assertUsable();
  checkAliases(kernel, plan, touched);
  const groups = fold(kernel, options.workgroups);
  const recorded = !gpu.stream.muted && !groups.includes(0);
  for (const observer of launchObservers) {
    observer(kernel, entry, {
      bind, params: (options.params ?? {}) as Readonly<Record<string, number>>,
      conditions: options.conditions ?? [], recorded,
    });
  }
  if (!recorded) return;

  const constants = (options.constants ?? {}) as Readonly<Record<string, number>>;
  const conditions = inOrder(options.conditions ?? []);
  let key = `${kernel}|${entry}|${conditions.join()}`;
  for (const name in constants) key += `|${name}=${constants[name]}`;
  const pipeline = pipelinesOf(gpu).get(key, () => {
    for (const name in constants) {
      if (!(name in shape.overrides)) throw new GpuError(`Kernel ${kernel} has no override ${name}.`);
    }
    for (const condition of conditions) {
      if (!shape.conditions.includes(condition)) {
        throw new GpuError(`Kernel ${kernel} has no condition ${condition}.`);
      }
    }
    return { kernel, entry, bindings: slots, usesParams, constants, conditions };
  });
  const device = gpu;
  const makeGroup = () => device.bindGroup(pipeline.layoutKey, pipeline.layout, views);
  const uniforms = usesParams
    ? pack(kernel, plan, options.params as Record<string, number> | undefined)
    : null;
  gpu.stream.dispatch(pipeline, makeGroup, uniforms, groups, touched);
}

function planOf(kernel: KernelName, wanted: string | undefined): EntryPlan {
  const key = wanted === undefined ? kernel : `${kernel}|${wanted}`;
  const known = plans.get(key);
  if (known) return known;
  const shape: KernelShape = manifest[kernel];
  const entry = wanted ?? onlyEntry(kernel, shape);
  const used = shape.entries[entry];
  if (!used) throw new GpuError(`Kernel ${kernel} has no entry point ${entry}.`);
  const fields = Object.entries(shape.params).map(([name, type]) => ({ name, type }));
  const plan = {
    entry, shape, fields, usesParams: used.includes("params"),
    slots: used.filter((name) => name !== "params").map((name) => ({ name, ...shape.bindings[name]! })),
    uniforms: new Uint8Array(scratch.buffer, 0, Math.max(16, Math.ceil(fields.length / 4) * 16)),
  };
  plans.set(key, plan);
  return plan;
}

function onlyEntry(kernel: string, shape: KernelShape): string {
  const entries = Object.keys(shape.entries);
  if (entries.length === 1) return entries[0]!;
  throw new GpuError(`Kernel ${kernel} has the entry points ${entries.join(", ")}; a launch must name one.`);
}

function refuseBinding(
  kernel: string, { entry, slots }: EntryPlan, bind: Readonly<Record<string, unknown>>,
): never {
  const names = slots.map(({ name }) => name);
  const unknown = Object.keys(bind).find((name) => bind[name] && !names.includes(name));
  throw new GpuError(
    `Kernel ${kernel} (${entry}) does not use a binding ${unknown}; it uses ${names.join(", ")}.`);
}

function checkAliases(kernel: string, { slots }: EntryPlan, buffers: readonly PooledBuffer[]): void {
  for (let i = 0; i < buffers.length; i++) {
    if (slots[i]!.access === "read") continue;
    for (let j = 0; j < buffers.length; j++) {
      if (j !== i && buffers[j] === buffers[i]) {
        throw new GpuError(
          `Kernel ${kernel} would write a buffer that is bound a second time in the same launch.`);
      }
    }
  }
}

/** Conditions in the order of the alphabet, so that one set is one pipeline. */
function inOrder(conditions: readonly string[]): readonly string[] {
  for (let i = 1; i < conditions.length; i++) {
    if (conditions[i]! < conditions[i - 1]!) return [...conditions].sort();
  }
  return conditions;
}

function fold(kernel: string, workgroups: readonly number[]): [number, number, number] {
  const [x = 1, y = 1, z = 1] = workgroups;
  if (workgroups.length === 1 && x > MAX_GROUPS) {
    const rows = Math.ceil(x / MAX_GROUPS);
    if (rows <= MAX_GROUPS) return [Math.ceil(x / rows), rows, 1];
  }
  for (const n of [x, y, z]) {
    if (!Number.isInteger(n) || n < 0 || n > MAX_GROUPS) {
      throw new GpuError(
        `Kernel ${kernel}: a workgroup count must be a whole number from 0 to ${MAX_GROUPS}, found ${n}.`);
    }
  }
  return [x, y, z];
}

function pack(kernel: string, plan: EntryPlan, params: Record<string, number> | undefined): Uint8Array {
  let offset = 0;
  for (const { name, type } of plan.fields) {
    const value = params?.[name];
    if (value === undefined) {
      throw new GpuError(`Kernel ${kernel} needs the parameter ${name}, but none was given.`);
    }
    if (type === "f32") scratch.setFloat32(offset, value, true);
    else if (type === "i32") scratch.setInt32(offset, value, true);
    else scratch.setUint32(offset, value, true);
    offset += 4;
  }
  for (const name in params) {
    if (!(name in plan.shape.params)) throw new GpuError(`Kernel ${kernel} has no parameter ${name}.`);
  }
  return plan.uniforms;
}
