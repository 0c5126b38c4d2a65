// jmm_fast._cuda: importing it registers the CUDA kernels with torch. Within Python's limited API, as jmm_fast._C.

#include <Python.h>

#include "motion_mask/cuda_kernel.h"

namespace {

PyObject* load_error(PyObject*, PyObject*) {
  const char* error = jmm_fast::motion_mask::cuda::load_error();
  if (error == nullptr) Py_RETURN_NONE;
  return PyUnicode_FromString(error);
}

PyMethodDef methods[] = {
    {"load_error", load_error, METH_NOARGS, "None when the kernels run on the current GPU, else CUDA's reason."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_cuda",
                          "CUDA kernels of jmm_fast; importing the module registers them with torch.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda(void) { return PyModule_Create(&definition); }
