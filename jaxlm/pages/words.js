"use strict";
const MOST_WORDS = 1500;

// The parts of `after`, as [text, whether it is not in `before`], by the longest common subsequence of words.
function changedParts(before, after) {
  const split = (text) => text.match(/\s+|[^\s]+/g) || [];
  const isWord = (part) => /\S/.test(part);
  const old = split(before).filter(isWord), parts = split(after), words = parts.filter(isWord);
  if (old.length > MOST_WORDS || words.length > MOST_WORDS) return [[after, false]];
  const kept = commonWords(old, words);
  let number = 0;
  return parts.map((part) => [part, isWord(part) && !kept[number++]]);
}

// Which of `words` belong to the longest subsequence that they share with `old`.
function commonWords(old, words) {
  const width = words.length + 1;
  const longest = new Uint16Array((old.length + 1) * width);
  for (let i = old.length - 1; i >= 0; i--) {
    for (let j = words.length - 1; j >= 0; j--) {
      longest[i * width + j] = old[i] === words[j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const kept = words.map(() => false);
  for (let i = 0, j = 0; i < old.length && j < words.length;) {
    if (old[i] === words[j]) { kept[j] = true; i++; j++; }
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  return kept;
}
