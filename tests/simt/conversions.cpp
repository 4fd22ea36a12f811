// Applies the host side of platform.h's conversions to a file of floats, for test_emulator.py to compare with torch.
// Arguments: input (n floats, n a multiple of 8), output folder. Writes bf16 and f16: from_float and pack8 of the
// input; and the floats of all 65536 patterns, from to_float and from unpack8.
#include <fstream>
#include <string>
#include <vector>

#include "platform.h"

using namespace tpfuse;

namespace {

template <class T>
void write(const std::string& path, const std::vector<T>& values) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(values.data()), std::streamsize(values.size() * sizeof(T)));
}

std::vector<float> read(const char* path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  std::vector<float> values(size_t(file.tellg()) / sizeof(float));
  file.seekg(0).read(reinterpret_cast<char*>(values.data()), std::streamsize(values.size() * sizeof(float)));
  return values;
}

template <class T>
void narrow(const std::vector<float>& x, const std::string& to) {
  std::vector<u16> one(x.size()), packed(x.size());
  for (size_t i = 0; i < x.size(); ++i) one[i] = from_float<T>(x[i]).bits;
  for (size_t i = 0; i < x.size(); i += 8) {
    float eight[8];
    for (size_t k = 0; k < 8; ++k) eight[k] = x[i + k];
    Vec16 v = pack8<T>(eight);
    for (size_t k = 0; k < 8; ++k) packed[i + k] = u16(v.w[k / 2] >> 16 * (k % 2));
  }
  write(to + ".one", one);
  write(to + ".packed", packed);
}

template <class T>
void widen(const std::string& to) {
  std::vector<float> one(65536), unpacked(65536);
  for (u32 i = 0; i < 65536; ++i) one[i] = to_float(T{u16(i)});
  for (u32 i = 0; i < 65536; i += 8) {
    Vec16 v;
    for (u32 k = 0; k < 4; ++k) v.w[k] = (i + 2 * k) | (i + 2 * k + 1) << 16;
    float eight[8];
    unpack8<T>(v, eight);
    for (u32 k = 0; k < 8; ++k) unpacked[i + k] = eight[k];
  }
  write(to + ".wide", one);
  write(to + ".unpacked", unpacked);
}

}  // namespace

int main(int, char** argv) {
  std::vector<float> x = read(argv[1]);
  std::string folder = argv[2];
  narrow<bf16>(x, folder + "/bf16");
  narrow<f16>(x, folder + "/f16");
  widen<bf16>(folder + "/bf16");
  widen<f16>(folder + "/f16");
}
