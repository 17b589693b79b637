/** What a training run keeps in host memory instead of on the device. */
import { UsageError } from "../tensor/errors.ts";
import type { Offload } from "../tensor/offload.ts";

/** Layers by their kind, with all that they keep; `layernorm`: the input of the norm in front of each. */
export const OFFLOADED_MODULES = ["attention", "mamba", "mlp", "moe", "layernorm"] as const;
export type OffloadedModule = (typeof OFFLOADED_MODULES)[number];

export interface OffloadChoice {
  /** Whose activations lie in host memory between the forward and the backward pass. */
  readonly activations: ReadonlySet<OffloadedModule>;
  /** Bytes of a tensor of activations; smaller ones stay. */
  readonly least: number;
  /** Whether moments and masters do, but for the update. */
  readonly optimizer: boolean;
}

/** The running forward pass, and which modules of it. */
export interface OffloadRun {
  readonly pass: Offload;
  readonly modules: ReadonlySet<OffloadedModule>;
}

/** Smaller tensors are not worth the way. */
const LEAST = 2 ** 16;

export const OFFLOAD_OFF: OffloadChoice = { activations: new Set(), least: LEAST, optimizer: false };

/**
 * "off"; or by commas "optimizer", and "activations" of all modules or of some: "activations=mamba+moe".
 * @throws UsageError for anything else
 */
export function parseOffload(text: string): OffloadChoice {
  if (text === "off") return OFFLOAD_OFF;
  let [activations, optimizer]: [readonly OffloadedModule[], boolean] = [[], false];
  for (const entry of text.split(",").map((part) => part.trim())) {
    const names = entry === "activations" ? OFFLOADED_MODULES
      : /^activations=(.+)$/.exec(entry)?.[1]!.split("+").map((name) => name.trim());
    const known = names?.filter((name): name is OffloadedModule =>
      OFFLOADED_MODULES.some((module) => module === name)) ?? [];
    if (entry === "optimizer") optimizer = true;
    else if (names && known.length === names.length) activations = known;
    else {
      throw new UsageError(
        "What is offloaded must be off, or optimizer and activations by commas, the latter perhaps with " +
        `modules among ${OFFLOADED_MODULES.join(", ")} as in activations=mamba+moe, found "${text}".`);
    }
  }
  return { ...OFFLOAD_OFF, activations: new Set(activations), optimizer };
}

/** Runs a part of a layer; what it keeps goes to host memory if the run says so. */
export function offloaded<T>(run: OffloadRun | null | undefined, module: OffloadedModule, body: () => T): T {
  return run?.modules.has(module) ? run.pass.part(body) : body();
}
