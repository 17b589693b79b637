/** Keeps texts by name between runs. */
export interface TunerStore {
  /** Where a text lies, for a person to read. */
  place(name: string): string;
  /** Null when there is none. */
  read(name: string): Promise<string | null>;
  write(name: string, text: string): Promise<void>;
  remove(name: string): Promise<void>;
}
