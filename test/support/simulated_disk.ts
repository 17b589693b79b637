/**
 * A disk in memory that forgets what was not synced: content of files until `sync`, names in a folder until
 * `syncFolder`. After a crash each unsynced change has happened or not, independently of the others.
 * Operations are counted, and can fail from a given one on.
 */
import { createHash } from "node:crypto";
import type { FileLayer } from "../../src/io/checkpoint_files.ts";
import { memorySource } from "../../src/io/files.ts";

interface SimulatedFile {
  kind: "file";
  content: Uint8Array;
  durable: Uint8Array;
}
interface SimulatedFolder {
  kind: "folder";
  entries: Map<string, Entry>;
  durable: Map<string, Entry>;
  /** Changes of names since the last sync; null removes. */
  pending: Map<string, Entry | null>[];
}
type Entry = SimulatedFile | SimulatedFolder;

/** What survives a crash: asked once for every unsynced change; a fraction of the content for files. */
export interface Survival {
  keepsName(): boolean;
  /** Bytes that reached the medium, out of `written`, when not synced. */
  keepsBytes(written: number): number;
}

/** What goes wrong: from operation `at` (1 is the first) on; "once" fails one operation,
  "dead" all that follow. */
export interface Fault {
  readonly at: number;
  readonly mode: "once" | "dead" | "full";
}

const folder = (): SimulatedFolder => ({ kind: "folder", entries: new Map(), durable: new Map(),
  pending: [] });

export class SimulatedDisk {
  /** Operations so far. */
  count = 0;
  fault: Fault | null = null;
  readonly running = new Set<string>();
  private root = folder();

  /** A process that uses the disk. */
  process(owner: string): FileLayer {
    this.running.add(owner);
    return {
      owner,
      isRunning: (other) => this.running.has(other),
      hasher() {
        const hash = createHash("sha256");
        return { update: (bytes) => void hash.update(bytes), digest: () => hash.digest("hex") };
      },
      makeFolder: async (path) => {
        this.step("makeFolder");
        const [parent, name] = this.place(path);
        if (parent.entries.has(name)) return;
        this.change(parent, [[name, folder()]]);
        this.step("syncFolder");
        this.settleNames(parent);
      },
      create: async (path) => {
        this.step("create");
        const [parent, name] = this.place(path);
        if (parent.entries.has(name)) return null;
        const file: SimulatedFile = { kind: "file", content: new Uint8Array(0), durable: new Uint8Array(0) };
        this.change(parent, [[name, file]]);
        return {
          write: async (bytes) => {
            // Half of a write that fails has happened.
            const failed = this.attempt("write");
            const taken = failed ? bytes.subarray(0, bytes.length >> 1) : bytes;
            file.content = Uint8Array.from([...file.content, ...taken]);
            if (failed) throw failed;
          },
          sync: async () => {
            this.step("sync");
            file.durable = file.content;
          },
          close: async () => this.step("close"),
        };
      },
      syncFolder: async (path) => {
        this.step("syncFolder");
        const target = this.find(path);
        if (target?.kind !== "folder") throw new Error(`ENOENT ${path}`);
        this.settleNames(target);
      },
      rename: async (from, to) => {
        this.step("rename");
        const [parent, name] = this.place(from);
        const [target, newName] = this.place(to);
        const entry = parent.entries.get(name);
        if (!entry || parent !== target) throw new Error(`ENOENT ${from}`);
        const existing = target.entries.get(newName);
        if (existing?.kind === "folder" && existing.entries.size > 0) throw new Error(`ENOTEMPTY ${to}`);
        this.change(parent, [[name, null], [newName, entry]]);
      },
      readText: async (path) => {
        this.step("readText");
        const file = this.find(path);
        return file?.kind === "file" ? new TextDecoder().decode(file.content) : null;
      },
      list: async (path) => {
        this.step("list");
        const target = this.find(path);
        return target?.kind === "folder" ? [...target.entries.keys()].toSorted() : [];
      },
      remove: async (path) => this.removeEntry(path),
      openFile: async (path) => {
        this.step("openFile");
        const file = this.find(path);
        return file?.kind === "file" ? memorySource(path, file.content) : null;
      },
      pause: async () => {},
    };
  }

  /** Power off and on: no process is left, and of the unsynced changes only what `survival` keeps. */
  crash(survival: Survival): void {
    const settle = (entry: Entry): Entry => {
      if (entry.kind === "file") {
        const written = entry.content.length;
        const kept = entry.content === entry.durable ? written : survival.keepsBytes(written);
        const content = kept > entry.durable.length ? entry.content.slice(0, kept) : entry.durable;
        return { kind: "file", content, durable: content };
      }
      const names = new Map(entry.durable);
      for (const change of entry.pending) {
        if (!survival.keepsName()) continue;
        for (const [name, child] of change) {
          if (child) names.set(name, child);
          else names.delete(name);
        }
      }
      const settled = new Map([...names].map(([name, child]) => [name, settle(child)]));
      return { kind: "folder", entries: settled, durable: new Map(settled), pending: [] };
    };
    this.root = settle(this.root) as SimulatedFolder;
    this.running.clear();
    this.fault = null;
  }

  private attempt(operation: string): Error | null {
    this.count++;
    const { fault } = this;
    if (!fault || this.count < fault.at) return null;
    const needsSpace = operation === "create" || operation === "write" || operation === "makeFolder";
    const fails = fault.mode === "dead" || (fault.mode === "once" ? this.count === fault.at : needsSpace);
    return fails ? new Error(`${fault.mode} at ${operation} (operation ${this.count})`) : null;
  }

  private step(operation: string): void {
    const failed = this.attempt(operation);
    if (failed) throw failed;
  }

  private removeEntry(path: string): void {
    const entry = this.find(path);
    if (entry?.kind === "folder") {
      for (const name of entry.entries.keys()) this.removeEntry(`${path}/${name}`);
    }
    this.step("remove");
    const [parent, name] = this.place(path);
    if (entry) this.change(parent, [[name, null]]);
  }

  private change(parent: SimulatedFolder, names: [string, Entry | null][]): void {
    for (const [name, entry] of names) {
      if (entry) parent.entries.set(name, entry);
      else parent.entries.delete(name);
    }
    parent.pending.push(new Map(names));
  }

  private settleNames(target: SimulatedFolder): void {
    target.durable = new Map(target.entries);
    target.pending = [];
  }

  private find(path: string): Entry | undefined {
    let entry: Entry | undefined = this.root;
    for (const name of path.split("/")) {
      entry = entry?.kind === "folder" ? entry.entries.get(name) : undefined;
    }
    return entry;
  }

  private place(path: string): [SimulatedFolder, string] {
    const slash = path.lastIndexOf("/");
    const parent = slash < 0 ? this.root : this.find(path.slice(0, slash));
    if (parent?.kind !== "folder") throw new Error(`ENOENT ${path}`);
    return [parent, path.slice(slash + 1)];
  }
}
