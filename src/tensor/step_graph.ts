/** A step of ranks on one or several devices, captured on all of them at once. */
import type { GraphMemory } from "../gpu/pool.ts";
import type { Traffic } from "../gpu/lane.ts";
import type { Graph } from "../gpu/stream.ts";
import type { Device } from "./device.ts";

export interface StepGraph {
  /** Of all devices together. */
  readonly memory: GraphMemory;
  readonly launches: number;
  /** What passes between ranks in a replay, and in which pass. */
  readonly traffic: readonly { readonly traffic: Traffic; readonly pass: string }[];
  replay(): void;
  dispose(): void;
}

/** Records `step` on all devices without running it. */
export function captureOn(devices: readonly Device[], step: () => void): StepGraph {
  const graphs: { device: Device; graph: Graph }[] = [];
  const record = (rest: readonly Device[]): void => {
    const [device] = rest;
    if (!device) return step();
    const { graph } = device.capture(() => record(rest.slice(1)));
    graphs.unshift({ device, graph });
  };
  const dispose = () => {
    for (const { device, graph } of graphs) device.stream.disposeGraph(graph);
  };
  try {
    record(devices);
  } catch (error) {
    dispose();
    throw error;
  }
  const total = (key: keyof GraphMemory) => graphs.reduce((sum, { graph }) => sum + graph.memory[key], 0);
  return {
    memory: {
      peak: total("peak"), live: total("live"), total: total("total"), tensors: total("tensors"),
      buffers: total("buffers"),
    },
    // Devices that take part note a collective each.
    traffic: [...new Map(graphs.flatMap(({ graph }) => graph.traffic).map((one) =>
      [one.traffic, one])).values()],
    launches: graphs.reduce((sum, { graph }) => sum + graph.launches, 0),
    replay() {
      for (const { device, graph } of graphs) device.replay(graph);
    },
    dispose,
  };
}
