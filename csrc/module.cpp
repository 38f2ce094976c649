// drive_kernels._C: build facts. Loading it registers the ops' compiled kernels. In Python's own C API: pybind11
// takes eight seconds to compile.
#include <Python.h>

#include <exception>

#include "common/capability.h"
#include "common/recycle.h"

#if defined(DRIVE_WITH_CUDA)
#include "common/served.h"
#endif

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue(
#if defined(DRIVE_WITH_CUDA)
      "{ssssssssss}", "cuda", DRIVE_WITH_CUDA, "gpu architectures", DRIVE_GPU_ARCHITECTURES,
#else
      "{ssssssss}", "cuda", "not built",
#endif
#if defined(__x86_64__)
      "cpu variants", "portable, AVX2, AVX-512",
#else
      "cpu variants", "portable",
#endif
      "cpu capability", drive::cpu_capability().c_str(), "compiler", __VERSION__);
}

#if defined(DRIVE_WITH_CUDA)
PyObject* why_not_served(PyObject*, PyObject* arguments) {
  int gpu;
  if (!PyArg_ParseTuple(arguments, "i", &gpu)) return nullptr;
  try {
    return Py_BuildValue("z", drive::why_not_served(static_cast<c10::DeviceIndex>(gpu)));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}
#endif

PyObject* release_memory(PyObject*, PyObject*) { return PyLong_FromSize_t(drive::release_recycled()); }

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS, "What was compiled, and how."},
    {"release_memory", release_memory, METH_NOARGS, "Gives back memory that is kept; how many bytes."},
#if defined(DRIVE_WITH_CUDA)
    {"why_not_served", why_not_served, METH_VARARGS, "Why the kernels cannot run on a GPU, or None."},
#endif
    {},
};

PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
