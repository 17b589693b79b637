import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { dirname, join } from "node:path";
import type { Readable } from "node:stream";
import { fileURLToPath } from "node:url";
import type { Peer } from "./peers.ts";
import { type Reply, type Request, formatRequest, lineSplitter, parseReply } from "./protocol.ts";

const WORKER = fileURLToPath(new URL("worker.ts", import.meta.url));
const SOURCE = fileURLToPath(new URL("../../src/cli/source.mjs", import.meta.url));
const PATIENCE_MS = 240_000;

/** Files of the packaged SwiftShader: its Vulkan manifest and a loader. */
export interface SoftwareDriver {
  readonly manifest: string;
  readonly loader: string;
}

/** Which of a system's driver manifests serves an adapter, by what both names contain. */
const DRIVERS: readonly (readonly [adapter: RegExp, manifest: RegExp])[] = [
  [/lavapipe|llvmpipe/i, /^lvp_/], [/nvidia/i, /^nvidia/], [/amd|radeon/i, /^(radeon|amd)/],
  [/intel/i, /^intel_icd/],
];
const MANIFESTS = ["/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/usr/share/vulkan/icd.d"];

/**
 * The environment in which the Vulkan loader finds the adapter's driver and nothing else, for peers that take
 * the first adapter there is. An adapter of an unknown driver leaves the environment as it is.
 */
export function environmentFor(adapter: string, software: SoftwareDriver | null): NodeJS.ProcessEnv {
  const env = { ...process.env };
  const only = (manifest: string) => ({ ...env, VK_DRIVER_FILES: manifest, VK_ICD_FILENAMES: manifest });
  if (/swiftshader/i.test(adapter)) {
    if (!software) return env;
    const libraries = [dirname(software.loader), env["LD_LIBRARY_PATH"]].filter(Boolean).join(":");
    return { ...only(software.manifest), LD_LIBRARY_PATH: libraries };
  }
  if (env["VK_DRIVER_FILES"]) return env;
  const wanted = DRIVERS.find(([name]) => name.test(adapter))?.[1];
  for (const folder of wanted ? MANIFESTS.filter((path) => existsSync(path)) : []) {
    const file = readdirSync(folder).find((name) => wanted!.test(name) && name.endsWith(".json"));
    if (file) return only(join(folder, file));
  }
  return env;
}

/** A peer in a process of its own, started by the first request and again after a crash. */
export class PeerProcess {
  readonly peer: Peer;
  readonly #adapter: string;
  readonly #env: NodeJS.ProcessEnv;
  #child: ChildProcess | null = null;
  #onReply: ((reply: Reply) => void) | null = null;

  constructor(peer: Peer, adapter: string, software: SoftwareDriver | null) {
    this.peer = peer;
    this.#adapter = adapter;
    this.#env = { ...environmentFor(adapter, software), NODE_NO_WARNINGS: "1", ...peer.env };
  }

  get name(): string {
    return this.peer.name;
  }

  /** The peer's answer; a crash or a silence of four minutes is an answer with an error. */
  async ask(request: Request): Promise<Reply> {
    const child = this.#child ??= this.#start();
    return new Promise((resolve) => {
      const timer = setTimeout(() => {
        this.#onReply?.({ ok: false, error: `No answer within ${PATIENCE_MS / 1000} s.` });
        this.close();
      }, PATIENCE_MS);
      this.#onReply = (reply) => {
        clearTimeout(timer);
        this.#onReply = null;
        resolve(reply);
      };
      child.stdin!.write(formatRequest(request));
    });
  }

  close(): void {
    this.#child?.kill("SIGKILL"); // drivers may hang in their own exit handlers
    this.#child = null;
  }

  #start(): ChildProcess {
    const { node, options = [] } = this.peer;
    const own = node && fileURLToPath(new URL(node, import.meta.url));
    const command = own && existsSync(own) ? own : process.execPath;
    const child = spawn(command, [...options, SOURCE, WORKER, this.name, this.#adapter], {
      env: this.#env, stdio: ["pipe", "ignore", "pipe", "pipe"],
    });
    let complaint = "";
    child.stderr!.setEncoding("utf8").on("data", (text: string) => {
      complaint = (complaint + text).slice(-2000);
    });
    const split = lineSplitter((line) => {
      try {
        this.#onReply?.(parseReply(line));
      } catch (error) {
        this.#onReply?.({ ok: false, error: (error as Error).message });
      }
    });
    (child.stdio[3] as Readable).setEncoding("utf8").on("data", split);
    child.stdin!.on("error", () => {}); // a write to a process that is gone; `close` below reports it
    child.on("close", (code, signal) => {
      if (this.#child === child) this.#child = null;
      const said = complaint.trim().split("\n").at(-1) ?? "";
      this.#onReply?.({ ok: false, error: `Its process ended with ${signal ?? code}. ${said}`.trim() });
    });
    return child;
  }
}
